"""From a checked body to the sequences to generate: prompts as token ids, and one request for each choice.

Checks everything that needs the model's card: vocabulary, context, tokenizer. Sends nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from expertmesh.engine.api import GenerateRequest, SamplingParams
from expertmesh.errors import InvalidRequestError
from expertmesh.serve.schemas import ChatBody, CompletionBody, GenerateBody
from expertmesh.serve.surface import Surface
from expertmesh.serve.text import TextCodec

_SLOW_TEXT = 16_384
"""Characters from which tokenizing takes long enough (milliseconds) to hold up other requests' streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One sequence to continue."""

    ids: tuple[int, ...]
    text: str | None = None
    """As the client wrote it; None if it sent token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One sequence to generate: the `index`-th of the answer."""

    index: int
    prompt: Prompt
    request: GenerateRequest


async def completion_prompts(surface: Surface, body: CompletionBody) -> list[Prompt]:
    """Raises InvalidRequestError for a prompt that cannot be tokenized or has ids outside of the vocabulary."""
    check_choices(surface, len(body.prompt), body.n)  # before any is tokenized
    prompts = []
    for prompt in body.prompt:
        if isinstance(prompt, str):
            codec = surface.require_codec("a text prompt")
            ids = await encode(codec, prompt, add_special_tokens=body.add_special_tokens)
            prompts.append(Prompt(ids=ids, text=prompt))
        else:
            check_token_ids(surface, prompt, "prompt")
            prompts.append(Prompt(ids=tuple(prompt)))
    return prompts


async def chat_prompt(surface: Surface, body: ChatBody) -> Prompt:
    """Raises InvalidRequestError where there is no chat template, or where it cannot take the messages."""
    codec = surface.require_codec("chat")
    variables = dict(body.chat_template_kwargs)
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    opens_turn = body.add_generation_prompt
    text = codec.render_chat(
        [message.for_template() for message in body.messages],
        tools=() if body.tool_choice == "none" else body.tools,
        add_generation_prompt=not body.continue_final_message if opens_turn is None else opens_turn,
        continue_final_message=body.continue_final_message,
        variables=variables,
    )
    return Prompt(ids=await encode(codec, text, add_special_tokens=body.add_special_tokens), text=text)


async def encode(codec: TextCodec, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    """Tokenize without holding up the event loop."""
    if len(text) < _SLOW_TEXT:
        return codec.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(codec.encode, text, add_special_tokens=add_special_tokens)


def check_token_ids(surface: Surface, ids: Iterable[int], param: str) -> None:
    size = surface.card.vocab_size
    for token_id in ids:
        if not 0 <= token_id < size:
            reason = f"{param}: token id {token_id} is not in the vocabulary (0 to {size - 1})"
            raise InvalidRequestError(reason, param=param)


def check_choices(surface: Surface, num_prompts: int, n: int) -> None:
    if num_prompts * n > surface.limits.max_choices:
        reason = f"{num_prompts} prompts times n = {n} is more than {surface.limits.max_choices} choices"
        raise InvalidRequestError(reason, param="n")


def plan_choices(
    surface: Surface, body: GenerateBody, num_top_logprobs: int | None, prompts: Sequence[Prompt], answer_id: str
) -> tuple[Choice, ...]:
    """All choices of an answer: `n` for each prompt in turn.

    With a seed, a prompt's i-th choice has seed + i wherever the prompt stands; without, each has one of its own.
    """
    check_choices(surface, len(prompts), body.n)
    if body.stop:
        surface.require_codec("stop")
    check_token_ids(surface, body.stop_token_ids, "stop_token_ids")
    bias = _logit_bias(surface, body)
    choices: list[Choice] = []
    for prompt in prompts:
        max_tokens = _max_tokens(surface, body, prompt)
        for i in range(body.n):
            index = len(choices)
            sampling = SamplingParams(
                max_tokens=max_tokens,
                temperature=body.temperature,
                top_p=body.top_p,
                top_k=body.top_k if 0 < body.top_k < surface.card.vocab_size else 0,
                min_p=body.min_p,
                seed=surface.rng.getrandbits(63) if body.seed is None else (body.seed + i) % 2**63,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                repetition_penalty=body.repetition_penalty,
                logit_bias=bias,
                min_tokens=body.min_tokens,
                stop_token_ids=tuple(body.stop_token_ids),
                ignore_eos=body.ignore_eos,
                top_logprobs=num_top_logprobs,
            )
            request = GenerateRequest(
                request_id=f"{answer_id}-{index}", prompt_ids=prompt.ids, sampling=sampling, gate=body.gate
            )
            choices.append(Choice(index=index, prompt=prompt, request=request))
    return tuple(choices)


def _max_tokens(surface: Surface, body: GenerateBody, prompt: Prompt) -> int:
    """What was asked for if it fits, the rest of the context if nothing was."""
    if not prompt.ids:
        raise InvalidRequestError("prompt is empty; send at least one token", param="prompt")
    context, length, wanted = surface.card.max_context, len(prompt.ids), body.token_limit
    room = context - length
    if room >= (1 if wanted is None else wanted):
        return room if wanted is None else wanted
    asked = f"{length} in the prompt" + ("" if wanted is None else f" and {wanted} to generate")
    raise InvalidRequestError(
        f"this model's context is {context} tokens, but {asked} were asked for; shorten the prompt or max_tokens",
        param=("messages" if isinstance(body, ChatBody) else "prompt") if room < 1 else "max_tokens",
        code="context_length_exceeded",
    )


def _logit_bias(surface: Surface, body: GenerateBody) -> dict[int, float]:
    try:
        bias = {int(token_id): value for token_id, value in body.logit_bias.items()}
    except ValueError as error:
        raise InvalidRequestError("logit_bias: keys must be token ids", param="logit_bias") from error
    check_token_ids(surface, bias, "logit_bias")
    return bias
