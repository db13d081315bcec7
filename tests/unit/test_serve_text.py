"""Text to ids and back, against one-shot decoding by the tokenizers themselves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import CheckpointError, InvalidRequestError
from expertmesh.serve.text import REPLACEMENT, TextCodec, TextStream, load_codec
from expertmesh.testing.tokenizers import byte_fallback_tokenizer, byte_level_tokenizer

BYTE_LEVEL = TextCodec(byte_level_tokenizer())
BYTE_FALLBACK = TextCodec(byte_fallback_tokenizer())
CODECS = pytest.mark.parametrize("codec", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])

byte_level_ids = st.lists(st.integers(0, 419), max_size=120)
raw_byte_ids = st.lists(st.integers(6, 262), max_size=120)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=80) | st.text("ab é€😀\ufffd", max_size=80)


def pieces(stream: TextStream, ids: list[int] | tuple[int, ...]) -> list[str]:
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


@given(ids=byte_level_ids | raw_byte_ids, skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_byte_level_tokens_stream_to_what_they_decode_to_at_once(ids, skip):
    stream = TextStream(BYTE_LEVEL, skip_special_tokens=skip)
    text = "".join(pieces(stream, ids))
    assert text == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
    assert stream.length == len(text)


@CODECS
@given(text=texts)
@settings(max_examples=200, deadline=None)
def test_any_text_streams_to_what_its_tokens_decode_to_at_once(codec, text):
    ids = codec.encode(text, add_special_tokens=False)
    stream = TextStream(codec, skip_special_tokens=True)
    assert "".join(pieces(stream, ids)) == codec.decode(ids, skip_special_tokens=True)


@CODECS
@given(before=texts, after=texts)
@settings(max_examples=200, deadline=None)
def test_text_after_a_prompt_continues_it_as_one_decode_of_both_would(codec, before, after):
    before = before.rstrip(REPLACEMENT)  # at a prompt's end it looks like a character that the answer is to finish
    prompt, ids = (codec.encode(text, add_special_tokens=False) for text in (before, after))
    stream = TextStream(codec, skip_special_tokens=True)
    stream.prime(prompt)
    shown = codec.decode(prompt, skip_special_tokens=True)
    assert shown + "".join(pieces(stream, ids)) == codec.decode(prompt + ids, skip_special_tokens=True)


@CODECS
def test_no_part_of_a_character_is_ever_given_out(codec):
    text = "naïve 😀 €5 答え"
    stream = TextStream(codec, skip_special_tokens=True)
    given_out = pieces(stream, codec.encode(text, add_special_tokens=False))
    assert "".join(given_out) == text
    assert not any(REPLACEMENT in piece for piece in given_out)


@CODECS
@pytest.mark.parametrize("text", ["x 😀", "😀", "😀😀😀😀😀😀"])
def test_a_character_that_the_prompt_begins_is_finished_by_the_answer(codec, text):
    ids = codec.encode(text, add_special_tokens=False)
    for cut in (1, 2, 3):
        stream = TextStream(codec, skip_special_tokens=True)
        stream.prime(ids[:-cut])
        assert "".join(pieces(stream, ids[-cut:])) == "😀"


def test_a_long_run_of_byte_tokens_stays_whole():
    text = "😀" * 40
    stream = TextStream(BYTE_FALLBACK, skip_special_tokens=True)
    ids = BYTE_FALLBACK.encode(text, add_special_tokens=False)
    assert len(ids) >= 160
    assert "".join(pieces(stream, ids)) == text


def test_an_invalid_byte_after_text_takes_nothing_back():
    good = BYTE_FALLBACK.encode("a €", add_special_tokens=False)
    invalid = BYTE_FALLBACK.encode("😀", add_special_tokens=False)[-1]
    stream = TextStream(BYTE_FALLBACK, skip_special_tokens=True)
    assert "".join(pieces(stream, [*good, invalid])) == "a €" + REPLACEMENT


@CODECS
def test_the_work_for_one_token_does_not_grow_with_those_before_it(codec):
    class Counting(TextCodec):
        longest = 0

        def decode(self, ids, *, skip_special_tokens):
            self.longest = max(self.longest, len(ids))
            return super().decode(ids, skip_special_tokens=skip_special_tokens)

    counting = Counting(codec._tokenizer)
    euro_start = codec.encode("€", add_special_tokens=False)[-3]
    for ids in ([1] * 500, [euro_start] * 500, list(codec.encode("rows " * 200, add_special_tokens=False))):
        stream = TextStream(counting, skip_special_tokens=True)
        stream.prime(codec.encode("A host", add_special_tokens=False))
        pieces(stream, ids)
    assert counting.longest <= 40


@CODECS
def test_token_texts_keep_their_spaces_and_join_to_the_text(codec):
    ids = codec.encode("The gate picks experts", add_special_tokens=False)
    assert "".join(codec.token_text(token_id) for token_id in ids).strip() == "The gate picks experts"
    assert codec.token_text(ids[-1]).isascii()


@CODECS
@pytest.mark.parametrize("text", ["x 😀", "réponses", "答", "\x00\n"])
def test_token_bytes_join_to_the_exact_bytes(codec, text):
    ids = codec.encode("a" + text, add_special_tokens=False)
    assert b"".join(codec.token_bytes(token_id) for token_id in ids).strip(b" ") == ("a" + text).encode()


@CODECS
def test_ids_beyond_the_tokenizer_are_nothing(codec):
    assert codec.token_text(99_999) == ""
    assert codec.token_bytes(99_999) == b""


def test_text_that_is_not_unicode_is_the_clients_mistake():
    with pytest.raises(InvalidRequestError, match="Unicode"):
        BYTE_LEVEL.encode("half a pair: \ud83d", add_special_tokens=False)


def test_a_conversation_is_rendered_by_the_models_own_template():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert BYTE_LEVEL.render_chat(messages[:1]) == "<|user|>Hi</s><|assistant|>"
    open_end = BYTE_LEVEL.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert open_end == "<|user|>Hi</s><|assistant|>Yes"


def test_messages_that_the_template_refuses_are_the_clients_mistake():
    with pytest.raises(InvalidRequestError, match="unknown role parrot") as caught:
        BYTE_LEVEL.render_chat([{"role": "parrot", "content": "Hi"}])
    assert caught.value.param == "messages"


def test_a_client_cannot_bring_a_template_through_its_variables():
    with pytest.raises(InvalidRequestError, match="may not set chat_template"):
        BYTE_LEVEL.render_chat([{"role": "user", "content": ""}], variables={"chat_template": "x"})


def test_a_folder_without_a_tokenizer_has_no_codec(tmp_path):
    assert load_codec(tmp_path) is None


def test_a_broken_tokenizer_file_is_a_checkpoint_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match="cannot load the tokenizer"):
        load_codec(tmp_path)


@CODECS
def test_a_saved_tokenizer_loads_as_it_was(codec, tmp_path):
    codec._tokenizer.save_pretrained(tmp_path)
    loaded = load_codec(tmp_path)
    text = "The gate picks 😀"
    assert loaded.encode(text, add_special_tokens=True) == codec.encode(text, add_special_tokens=True)
    assert loaded.describe()["eos_token"] == "</s>"
    assert loaded.has_chat_template
