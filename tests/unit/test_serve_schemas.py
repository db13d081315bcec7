"""What bodies mean once read: defaults, nulls, harmless extras, and the two names of one field."""

from __future__ import annotations

import pytest

from expertmesh.errors import InvalidRequestError
from expertmesh.gates.spec import GateSpec
from expertmesh.serve.schemas import NO_OP_ONLY, ChatBody, ChatMessage, CompletionBody

TALK = {"messages": [{"role": "user", "content": "Hi"}]}


def completion(**fields) -> CompletionBody:
    return CompletionBody.model_validate({"prompt": "Hi", **fields})


def test_null_means_the_default_in_every_field():
    names = CompletionBody.model_fields.keys() - {"prompt"}
    assert completion(**dict.fromkeys(names | NO_OP_ONLY.keys())) == completion()
    names = ChatBody.model_fields.keys() - {"messages"}
    assert ChatBody.model_validate({**TALK, **dict.fromkeys(names)}) == ChatBody.model_validate(TALK)


def test_what_other_servers_take_and_we_have_no_use_for_is_ignored():
    extras = {"user": "me", "metadata": {"a": 1}, "service_tier": "auto", "store": False, "made_up": [1]}
    assert completion(**extras) == completion()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NO_OP_ONLY.items() for value in values])
def test_a_value_that_changes_nothing_is_taken_where_the_field_is_not_supported(name, value):
    assert completion(**{name: value}) == completion()


def test_a_gate_is_that_of_the_configs_fields():
    told = {"strategy": "top-p", "top_p": 0.5, "k": 2, "normalize": True}
    assert completion(gate=told).gate == GateSpec(**told)
    assert ChatBody.model_validate({**TALK, "gate": told}).gate == GateSpec(**told)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("switch", "gate must be an object"),
        ({}, r"^gate\.strategy: Field required"),
        ({"strategy": "topp"}, r"^gate\.strategy 'topp' is unknown: did you mean top-p"),
        ({"strategy": "softmax-topk", "k": "2"}, r"^gate\.k: Input should be a valid integer"),
        ({"strategy": "softmax-topk", "kk": 2}, "^gate: unknown key 'kk'; did you mean 'k'"),
        ({"strategy": "hash", "k": 1}, r"^gate\.strategy hash needs token_T and table_VK"),
        ({"strategy": "switch", "capacity_factor": 1.0}, "depend on the others of its batch; a request may not have"),
        ({"strategy": "expert-choice", "capacity_factor": 1.0}, "depend on the others of its batch; a request may not"),
        ({"strategy": "switch", "capacity_factor": 1.0, "depends_on_batch": True}, "is not a request's to set"),
    ],
)
def test_a_gate_that_cannot_be_is_refused_by_name(gate, message):
    with pytest.raises(InvalidRequestError, match=message) as refused:
        completion(gate=gate)
    assert (refused.value.param, refused.value.status) == ("gate", 400)


@pytest.mark.parametrize(
    ("given", "read"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_the_four_forms_of_a_prompt_are_one_list(given, read):
    assert CompletionBody.model_validate({"prompt": given}).prompt == read


def test_completions_stop_after_sixteen_tokens_and_chats_at_the_contexts_end():
    assert completion().token_limit == 16
    assert ChatBody.model_validate(TALK).token_limit is None


def test_the_newer_name_of_max_tokens_is_the_same_limit():
    assert completion(max_completion_tokens=5).token_limit == 5
    assert completion(max_completion_tokens=5, max_tokens=5).token_limit == 5
    with pytest.raises(InvalidRequestError, match="differ"):
        completion(max_completion_tokens=5, max_tokens=6)


def test_one_stop_string_is_a_list_of_one():
    assert completion(stop="\n").stop == ["\n"]


def test_text_parts_of_a_message_become_one_text():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert ChatMessage(role="user", content=parts).for_template() == {"role": "user", "content": "one\ntwo"}


def test_a_templates_tool_calls_have_their_arguments_as_objects():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    message = ChatMessage(role="assistant", content=None, tool_calls=[call]).for_template()
    assert message["content"] == ""
    assert message["tool_calls"][0]["function"]["arguments"] == {"x": 1}


def test_arguments_that_are_not_json_are_the_clients_mistake():
    message = ChatMessage(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])
    with pytest.raises(InvalidRequestError, match="JSON"):
        message.for_template()
