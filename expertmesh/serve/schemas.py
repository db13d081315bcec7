"""What clients may send: one frozen model per request body, with every bound that can be checked without the model.

Knows nothing of tokenizers, vocabularies or contexts. The one rule: a field is honoured, harmless, or refused by name.
`null` means "the default", as clients send it for what they leave out; a field that we do not know is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from expertmesh.config import GateSection, describe
from expertmesh.errors import ConfigError, InvalidRequestError
from expertmesh.fault import Fault, FaultKind
from expertmesh.gates.spec import GateSpec

MAX_LOGPROBS = 20
MAX_N = 128
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

NO_OP_ONLY: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
"""Fields that other servers give a meaning which we lack, each with the values that change nothing."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _parse_prompt(value: Any) -> list[str | list[int]]:
    """The four forms of `prompt` as one list of prompts."""
    prompts = [value] if isinstance(value, str) or (value and _is_token_ids(value)) else value
    if not isinstance(prompts, list) or not all(isinstance(item, str) or _is_token_ids(item) for item in prompts):
        raise InvalidRequestError(
            "prompt must be a string, a list of strings, a list of token ids or a list of lists of token ids",
            param="prompt",
        )
    if not prompts or not all(prompts):
        raise InvalidRequestError("prompt is empty; send at least one token", param="prompt")
    return prompts


def _parse_content(value: Any) -> Any:
    """Text parts as one string: chat templates of text models expect one."""
    if not isinstance(value, list):
        return value
    texts: list[Any] = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) != len(value) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequestError("message content may only have parts of type text", param="messages")
    return "\n".join(texts)


def _parse_gate(value: Any) -> GateSpec:
    """The fields of the config's `gate`, but for the gates that look at the batch: that is others' too."""
    if not isinstance(value, dict):
        raise InvalidRequestError("gate must be an object, such as {'strategy': 'softmax-topk', 'k': 1}", param="gate")
    if "depends_on_batch" in value:
        raise InvalidRequestError("gate.depends_on_batch is not a request's to set; leave it out", param="gate")
    try:
        spec = GateSection.model_validate({**value, "depends_on_batch": True}, strict=True).spec
    except ValidationError as error:
        reason = describe(error)
        if error.errors()[0]["loc"]:
            reason = f"gate.{reason}"
        raise InvalidRequestError(reason if reason.startswith("gate.") else f"gate: {reason}", param="gate") from error
    if not spec.is_alone:
        raise InvalidRequestError(f"{spec.why_not_alone}; a request may not have such a gate", param="gate")
    return spec


Stop = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list), Field(max_length=16)]
TokenId = Annotated[int, Field(ge=0)]


class Body(BaseModel):
    """Base of all bodies: JSON types are taken as they are, never converted, and numbers are finite."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore")
    no_op_only: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls_and_refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {name: value for name, value in data.items() if value is not None}
        for name, harmless in cls.no_op_only.items():
            if name in data and data[name] not in harmless:
                raise InvalidRequestError(f"{name} is not supported here; leave it out", param=name)
        return data


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerateBody(Body):
    """What both endpoints that generate have in common."""

    no_op_only = NO_OP_ONLY

    model: str | None = None
    echo: bool = False
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    """The newer name of `max_tokens`."""
    min_tokens: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=INT64_MAX)
    """0 and -1 mean no limit."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: Annotated[int, Field(ge=INT64_MIN, le=INT64_MAX)] | None = None
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    n: int = Field(default=1, ge=1, le=MAX_N)
    stop: Stop = []
    stop_token_ids: list[TokenId] = Field(default=[], max_length=1024)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    gate: Annotated[GateSpec, PlainValidator(_parse_gate, json_schema_input_type=GateSection)] | None = None
    """An extension: chooses the experts of this request's tokens, in place of the model's own gate."""
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

    @property
    def token_limit(self) -> int | None:
        """Tokens to generate at most; None leaves it to the context's end."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _agree(self) -> Self:
        given = self.model_fields_set
        if "stream_options" in given and not self.stream:
            raise InvalidRequestError("stream_options needs stream to be true", param="stream_options")
        if {"max_tokens", "max_completion_tokens"} <= given and self.max_tokens != self.max_completion_tokens:
            reason = "max_tokens and max_completion_tokens differ; send one of them"
            raise InvalidRequestError(reason, param="max_completion_tokens")
        if self.token_limit == 0 and not self.echo:
            raise InvalidRequestError("max_tokens is 0, which is of use only with echo", param="max_tokens")
        if self.token_limit is not None and self.min_tokens > self.token_limit:
            raise InvalidRequestError("min_tokens is greater than max_tokens", param="min_tokens")
        return self


class CompletionBody(GenerateBody):
    """POST /v1/completions."""

    no_op_only = {**NO_OP_ONLY, "suffix": ("",)}

    prompt: Annotated[list[str | list[int]], PlainValidator(_parse_prompt, json_schema_input_type=str | list[Any])]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool = True


class ChatMessage(Body):
    """One turn. Fields that we do not know go to the chat template, which may."""

    model_config = ConfigDict(extra="allow")

    role: str = Field(min_length=1)
    content: Annotated[str, BeforeValidator(_parse_content)] = ""

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: arguments of tool calls are objects there, and JSON text in the API."""
        try:
            message = self.model_dump()
        except ValueError as error:
            raise InvalidRequestError("a message is nested too deeply", param="messages") from error
        calls = message.get("tool_calls", [])
        if not isinstance(calls, list):
            raise InvalidRequestError("tool_calls of a message must be a list", param="messages")
        for call in calls:
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                try:
                    function["arguments"] = json.loads(function["arguments"])
                except (ValueError, RecursionError) as error:
                    reason = "arguments of a tool call must be JSON text"
                    raise InvalidRequestError(reason, param="messages") from error
        return message


class ChatBody(GenerateBody):
    """POST /v1/chat/completions."""

    no_op_only = {
        **NO_OP_ONLY,
        "audio": (),
        "chat_template": (),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "tool_choice": ("none", "auto"),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[dict[str, Any]] = []
    tool_choice: str = "auto"
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool | None = None
    """Unless given: true, except with `continue_final_message`."""
    continue_final_message: bool = False
    add_special_tokens: bool = False
    """Beyond those that the template writes."""
    return_token_strs: bool = False
    """For /tokenize only."""
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS)

    @property
    def num_top_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @model_validator(mode="after")
    def _agree_on_chat(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        if self.add_generation_prompt and self.continue_final_message:
            reason = "add_generation_prompt and continue_final_message exclude one another"
            raise InvalidRequestError(reason, param="continue_final_message")
        return self


class TokenizeBody(Body):
    """POST /tokenize, for text. With `messages` in place of `prompt` it takes a `ChatBody`."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


class ScaleBody(Body):
    """POST /mesh/scale."""

    pool: str = Field(min_length=1)
    hosts: int = Field(ge=0, le=10_000)


class PoolBody(Body):
    """POST /mesh/auto."""

    pool: str = Field(min_length=1)


class DrainBody(Body):
    """POST /mesh/drain."""

    host: str = Field(min_length=1)


class RebalanceBody(Body):
    """POST /mesh/rebalance: an empty object."""


class FaultFields(Body):
    """One fault; see `expertmesh.fault`."""

    kind: FaultKind = Field(strict=False)
    share: float = Field(default=1.0, gt=0, le=1)
    factor: float = Field(default=1.0, ge=1, le=1e6)
    seconds: float = Field(default=0.0, ge=0, le=1e6)


class FaultBody(Body):
    """POST /mesh/fault."""

    target: str = Field(min_length=1)
    """A host's id, `router` (any one of them) or `controller`; of these two, the only fault is to be killed."""
    faults: list[FaultFields] = Field(default=[], max_length=16)
    """In place of those before."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of what is drawn at random."""

    @model_validator(mode="after")
    def _can_be(self) -> FaultBody:
        try:
            kinds = [Fault(**fault.model_dump()).kind for fault in self.faults]
        except ConfigError as error:
            raise InvalidRequestError(f"faults: {error}", param="faults") from error
        if self.target in ("router", "controller") and kinds != [FaultKind.KILL]:
            raise InvalidRequestError(f"faults: of a {self.target}, kill is the only one", param="faults")
        return self
