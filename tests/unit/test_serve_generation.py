"""One choice's text from its events: the same however events are batched, checked against decoding all at once."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.engine.api import FINISH_ERROR, FINISH_LENGTH, FINISH_STOP, PromptLogprobs, TokenEvent
from expertmesh.errors import ExpertMeshError, NoReadyReplicaError, OverloadedError
from expertmesh.ids import ExpertId
from expertmesh.serve.generation import Delta, Transcript, run_together
from expertmesh.serve.prompts import Prompt
from expertmesh.serve.schemas import CompletionBody
from expertmesh.serve.text import TextCodec
from expertmesh.testing.tokenizers import byte_level_tokenizer

CODEC = TextCodec(byte_level_tokenizer())
EOS = 1
PROMPT = Prompt(ids=CODEC.encode("The gate", add_special_tokens=False))


def body(**fields) -> CompletionBody:
    return CompletionBody.model_validate({"prompt": "x", **fields})


def event(token_id: int, finish_reason: str | None = None) -> TokenEvent:
    return TokenEvent(request_id="r", token_id=token_id, finish_reason=finish_reason)


def write(events: list[TokenEvent], cuts: list[int], **fields) -> Delta:
    """All that a transcript says when the events come in lists that end at `cuts`."""
    transcript = Transcript(CODEC, body(**fields))
    transcript.begin(PROMPT)
    deltas = []
    for start, end in zip([0, *cuts], [*cuts, len(events)], strict=True):
        deltas.append(transcript.write(events[start:end]))
        if deltas[-1].finish_reason:
            break
    return Delta.join(deltas)


def words(text: str, finish_reason: str = FINISH_LENGTH) -> list[TokenEvent]:
    ids = CODEC.encode(text, add_special_tokens=False)
    return [*map(event, ids[:-1]), event(ids[-1], finish_reason)]


@given(
    ids=st.lists(st.integers(6, 419), min_size=1, max_size=40),
    stops=st.lists(st.text("aeéo ", min_size=1, max_size=3), max_size=3),
    ends_itself=st.booleans(),
    cuts=st.lists(st.integers(0, 40), max_size=6),
)
@settings(max_examples=300, deadline=None)
def test_however_tokens_arrive_the_text_is_the_decoded_one_up_to_its_stop(ids, stops, ends_itself, cuts):
    if ends_itself:
        events = [*map(event, ids), event(EOS, FINISH_STOP)]
    else:
        events = [*map(event, ids[:-1]), event(ids[-1], FINISH_LENGTH)]
    said = write(events, sorted(min(cut, len(events)) for cut in cuts), stop=stops)
    text = CODEC.decode(ids, skip_special_tokens=True)
    first_ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if first_ends:
        _, start, stop = min(first_ends)
        assert (said.text, said.finish_reason, said.stop_reason) == (text[:start], FINISH_STOP, stop)
    else:
        assert said.text == text
        assert said.finish_reason == (FINISH_STOP if ends_itself else FINISH_LENGTH)
        assert [token.id for token in said.generated] == [event.token_id for event in events]


def test_tokens_after_a_stop_string_are_not_counted():
    events = words("one two three four")
    said = write(events, [], stop="two")
    counted = CODEC.decode([token.id for token in said.generated], skip_special_tokens=True)
    assert counted.startswith("one two")
    assert len(said.generated) < len(events)


def test_a_stop_string_within_the_first_min_tokens_does_not_count():
    events = words("stop and stop")
    num_first = len(CODEC.encode("stop", add_special_tokens=False))
    assert write(events, [], stop="stop").text == ""
    assert write(events, [], stop="stop", min_tokens=num_first).text == "stop and "


def test_the_text_of_a_stop_token_is_left_out_unless_asked_for():
    ids = CODEC.encode("one two", add_special_tokens=False)
    events = [*map(event, ids[:-1]), event(ids[-1], FINISH_STOP)]
    without = CODEC.decode(ids[:-1], skip_special_tokens=True)
    said = write(events, [], stop_token_ids=[ids[-1]])
    assert (said.text, said.stop_reason) == (without, ids[-1])
    assert write(events, [], stop_token_ids=[ids[-1]], include_stop_str_in_output=True).text == "one two"


def test_special_tokens_are_text_only_on_request():
    events = [event(3), event(4, FINISH_LENGTH)]
    assert write(events, []).text == ""
    assert write(events, [], skip_special_tokens=False).text == "<|user|><|assistant|>"


def test_offsets_point_at_each_tokens_place_in_the_text():
    said = write(words("é 😀 experts"), [])
    for token, after in zip(said.tokens, said.tokens[1:], strict=False):
        here = said.text[token.offset : after.offset]
        assert here in ("", CODEC.token_text(token.id)) or here in "é😀"


def test_an_echo_is_the_prompt_with_its_scores_and_the_text_goes_on_from_it():
    scored = PromptLogprobs(token_logprobs=(None, -1.0), top_logprobs=((), ((5, -0.5),)))
    prompt = Prompt(ids=PROMPT.ids[:2])
    transcript = Transcript(CODEC, body(echo=True))
    echo = transcript.echo(prompt, scored)
    rest = transcript.write(words(" picks"))
    assert echo.text + rest.text == CODEC.decode(prompt.ids, skip_special_tokens=True) + " picks"
    assert [token.logprob for token in echo.tokens] == [None, -1.0]
    assert echo.tokens[1].top_logprobs == ((5, -0.5),)
    assert echo.generated == ()
    assert rest.tokens[0].offset == len(echo.text)


def test_without_a_codec_only_tokens_speak():
    transcript = Transcript(None, body())
    transcript.begin(PROMPT)
    said = transcript.write([event(300), event(301, FINISH_LENGTH)])
    assert (said.text, [token.id for token in said.generated]) == ("", [300, 301])


def test_an_engines_error_is_raised_with_its_words():
    with pytest.raises(ExpertMeshError, match="out of memory"):
        write([TokenEvent(request_id="r", finish_reason=FINISH_ERROR, error="out of memory")], [])


def test_an_error_of_ours_is_raised_as_itself():
    cause = NoReadyReplicaError(ExpertId(0, 3))
    with pytest.raises(NoReadyReplicaError) as caught:
        write([TokenEvent(request_id="r", finish_reason=FINISH_ERROR, error=str(cause), cause=cause)], [])
    assert caught.value is cause


def test_of_works_that_run_together_the_first_failure_is_raised_as_itself():
    async def fail() -> None:
        raise OverloadedError("full")

    async def wait() -> None:
        await asyncio.Event().wait()

    with pytest.raises(OverloadedError, match="full"):
        asyncio.run(run_together([wait(), fail(), wait()]))
