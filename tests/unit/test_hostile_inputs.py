"""Faults that fuzzing found, one plain test each: inputs that once crashed, hung or filled the memory."""

from __future__ import annotations

import asyncio
import json
import struct
import sys
from pathlib import Path

import httpx
import msgpack
import pytest
import torch
from safetensors.torch import save_file

from expertmesh._proto import host_pb2 as pb
from expertmesh.checkpoint.conversion import UnsupportedConversionError, slice_stacked
from expertmesh.checkpoint.read import read_expert
from expertmesh.checkpoint.recipe import ExpertRecipe, TensorRecipe, TensorSource
from expertmesh.checkpoint.source import StoredTensor, resolve, stored_tensors
from expertmesh.cli import main
from expertmesh.config import parse_config
from expertmesh.config_file import load_config
from expertmesh.control.note import Note
from expertmesh.errors import CheckpointError, ConfigError, ProtocolError, TraceError
from expertmesh.hosts.configuration import HostConfiguration
from expertmesh.hosts.host import Host
from expertmesh.kernels.spec import ExpertSpec
from expertmesh.placement import Placement
from expertmesh.serve.backend import Limits, ModelCard
from expertmesh.serve.openai_api import create_app
from expertmesh.serve.text import TextCodec
from expertmesh.testing.experts import SILU
from expertmesh.testing.scripted import ScriptedBackend
from expertmesh.testing.tokenizers import byte_level_tokenizer
from expertmesh.trace.format import TraceDecoder
from expertmesh.transport import codec

FILE = "model.safetensors"


# --- between routers and hosts ---------------------------------------------------------------------------------------


SPEC = pb.ExpertSpec(hidden=4, intermediate=4, gated=True, activation="silu", dtype=pb.FLOAT32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_experts": [0]}, "of 1 to 65536 experts"),
        ({"layer_experts": [2**32 - 1]}, "of 1 to 65536 experts"),
        ({"layer_experts": [1] * 4097, "layer_specs": [0] * 4097}, "at most 4096 layers"),
        ({"specs": [SPEC, SPEC]}, "and all used"),
        ({"specs": [pb.ExpertSpec(hidden=4, intermediate=4, activation="swiglu_oai", dtype=1)]}, "for ungated experts"),
        ({"specs": [pb.ExpertSpec(hidden=4, intermediate=4, activation="none", dtype=1, gated=True)]}, "no activation"),
        (
            {"specs": [pb.ExpertSpec(hidden=4, intermediate=4, activation="silu", dtype=1, weight_format="int3")]},
            "no weight format 'int3'",
        ),
    ],
)
def test_a_configuration_that_no_host_could_follow_is_refused(changes, message) -> None:
    fields = {"checkpoint": "tiny", "specs": [SPEC], "layer_specs": [0], "layer_experts": [2]} | changes
    with pytest.raises(ProtocolError, match=message):
        codec.decode_configuration(pb.ConfigureRequest(**fields))


def test_experts_larger_than_the_host_are_refused_without_making_one() -> None:
    spec = ExpertSpec(hidden=2**31, intermediate=2**31, activation=SILU)
    with pytest.raises(ConfigError, match="holds no expert"):
        Host(2**30).configure(
            HostConfiguration(checkpoint="", specs=(spec,), layer_specs=(0,), layer_experts=(1,)),
        )


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_reply_that_took_no_possible_time_is_refused(seconds) -> None:
    with pytest.raises(ProtocolError, match="seconds"):
        codec.decode_reply(seconds, bytes(8), 1, 8)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def write_header(folder: Path, header: object) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / FILE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, None]}},
        {"a": {"dtype": "Q9", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, float("inf")]}},
        b"[" * 50_000,
    ],
    ids=["shape", "text", "nothing", "type", "infinity", "depth"],
)
def test_a_header_that_lies_is_refused(tmp_path, header) -> None:
    write_header(tmp_path, header)
    with pytest.raises(CheckpointError):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "a\nb", 5])
def test_an_index_may_not_leave_its_folder(tmp_path, file) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="no file inside of the folder"):
        stored_tensors(folder)


@pytest.mark.parametrize("index", ['{"weight_map": [1]}', "[" * 50_000, "5"], ids=["list", "depth", "number"])
def test_an_index_of_another_form_is_refused(tmp_path, index) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="not a valid weight index"):
        stored_tensors(tmp_path)


def test_an_empty_stack_is_not_taken_for_very_many_experts() -> None:
    with pytest.raises(UnsupportedConversionError):
        slice_stacked(("a", StoredTensor(file=FILE, dtype="F32", shape=(2**62, 0))))


def test_a_recipe_is_checked_before_it_is_read(tmp_path) -> None:
    save_file({"a": torch.ones(4, 4), "b": torch.ones(4, 3), "none": torch.ones(0, 4)}, tmp_path / FILE)
    spec = ExpertSpec(hidden=4, intermediate=4, gated=False, activation=SILU)
    a, b, none = (TensorSource(file=FILE, name=name) for name in ("a", "b", "none"))
    good = TensorRecipe(sources=(a,))
    for sources in ((a,) * 100_000, (a, b), (none,), (TensorSource(file=FILE, name="a", index=9),)):
        with pytest.raises(CheckpointError):
            read_expert(tmp_path, ExpertRecipe(w_in=TensorRecipe(sources=sources), w_out=good), spec)
    with pytest.raises(CheckpointError, match="biases"):
        read_expert(tmp_path, ExpertRecipe(w_in=good, w_out=good, b_in=good, b_out=good), spec)


@pytest.mark.parametrize("name", ["x" * 300, "\x00", "~\x00", "~\ud800", "a/\x1b[2J"])
def test_a_name_that_no_system_takes_is_no_model(name, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as refusal:
        resolve(name)
    assert str(refusal.value).isprintable()


# --- what users write ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a: 2001-99-99",
        "a: " + "9" * 5000,
        "a: !!int ''",
        "a: !!bool maybe",
        "a: !!timestamp x",
        "[" * 2000,
        "a: &a [*a]",
    ],
    ids=["date", "number", "int", "bool", "timestamp", "depth", "alias"],
)
def test_yaml_that_its_library_stumbles_over_is_refused(tmp_path, text) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "x.yaml")


def test_a_config_without_a_route_is_refused(tmp_path) -> None:
    (tmp_path / "x.yaml").write_text("applications: [{import_path: expertmesh.app:build, route_prefix: null}]")
    with pytest.raises(ConfigError, match="route_prefix"):
        load_config(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    "values",
    [
        {"exchange": {"timeout_s": float("inf")}},
        {"router": {"max_queue": 10**400}},
        {"pools": [{"labels": {"a\nb": 5}}]},
        {"model": "x" * 300, "a\nb": 1},
    ],
)
def test_a_config_that_could_not_be_followed_is_refused_in_one_line(values) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_config(values)
    assert str(refusal.value).isprintable()


def run_plan(monkeypatch, tmp_path, *options: str, current: str | None = None) -> int:
    (tmp_path / "loads.json").write_text('{"layers": [[1, 2]]}')
    (tmp_path / "hosts.json").write_text('{"hosts": [{"host": "a", "slots": 4}]}')
    arguments = ["expertmesh", "plan", "--loads", "loads.json", "--inventory", "hosts.json", *options]
    if current is not None:
        (tmp_path / "current.json").write_text(current)
        arguments += ["--current", "current.json"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("current", ["5", "null", "[" * 50_000], ids=["number", "null", "depth"])
def test_a_current_placement_of_another_form_is_refused(monkeypatch, tmp_path, current) -> None:
    assert run_plan(monkeypatch, tmp_path, current=current) == 2


def test_landing_slots_beyond_all_slots_are_not_counted_down(monkeypatch, tmp_path) -> None:
    assert run_plan(monkeypatch, tmp_path, "--landing-slots", str(2**62)) == 0


# --- what is left behind, and handed on ------------------------------------------------------------------------------


@pytest.mark.parametrize("note", [b"[" * 50_000, b"5", b"{}", b'{"epoch": "1", "replicas": [], "named": {}}'])
def test_a_note_that_cannot_be_read_says_what_to_do(note) -> None:
    with pytest.raises(ConfigError, match="deploy it anew"):
        Note.from_bytes(note)


@pytest.mark.parametrize(
    "value", [5, {}, {"epoch": 1, "num_experts": [10**12], "hosts": []}, {"epoch": 1, "num_experts": "ab", "hosts": []}]
)
def test_what_is_no_placement_is_refused(value) -> None:
    with pytest.raises(ProtocolError):
        Placement.from_json(value)


def test_a_trace_may_not_be_one_object_of_many_small_ones() -> None:
    row = b"\xdc\x10\x00" + b"\x90" * 4096
    with pytest.raises(TraceError, match="lists and maps"):
        list(TraceDecoder("x").feed(b"\xdc\x10\x00" + row * 4096))


def test_what_a_trace_says_of_itself_is_shown_in_short() -> None:
    deep: list[object] = []
    for _ in range(200):
        deep = [deep]
    header = {"format": "expertmesh-trace", "version": deep}
    with pytest.raises(TraceError, match="a trace of version") as refusal:
        list(TraceDecoder("x").feed(msgpack.packb(header)))
    assert len(str(refusal.value)) < 200


# --- HTTP ------------------------------------------------------------------------------------------------------------


def post(path: str, content: bytes, **headers: str) -> httpx.Response:
    card = ModelCard(name="tiny", root="tiny", max_context=64, vocab_size=420, created=7, eos_token_ids=(1,))
    backend = ScriptedBackend(lambda _: (300, 1), vocab_size=420, eos_token_ids=(1,))
    app = create_app(backend, card, TextCodec(byte_level_tokenizer()), Limits(max_choices=8))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            return await client.post(path, content=content, headers={"content-type": "application/json"} | headers)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "extra",
    [
        b'"tool_calls": 5',
        b'"x": ' + b"[" * 900 + b"]" * 900,
        b'"tool_calls": [{"function": {"arguments": "' + b"[" * 50_000 + b'"}}]',
    ],
    ids=["number", "depth", "arguments"],
)
def test_a_message_that_no_template_takes_is_refused(extra) -> None:
    response = post("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a", ' + extra + b"}]}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


def test_a_length_of_very_many_digits_is_too_long() -> None:
    assert post("/v1/completions", b"{}", **{"content-length": "9" * 5000}).status_code == 413


def test_prompts_are_counted_before_they_are_tokenized(monkeypatch) -> None:
    monkeypatch.setattr(
        TextCodec, "encode", lambda *_args, **_options: pytest.fail("tokenized") if _args[1] == "b" else (5,)
    )
    response = post("/v1/completions", json.dumps({"prompt": ["b"] * 9}).encode())
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")


def test_a_clients_own_key_does_not_break_the_line() -> None:
    response = post("/v1/completions", b'{"prompt": "a", "logit_bias": {"5\\n6": "x"}}')
    assert response.status_code == 400
    assert response.json()["error"]["message"].isprintable()
