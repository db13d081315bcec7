"""The benches run, and what they report can be trusted: a short form of what `make bench` does."""

from __future__ import annotations

import json
import subprocess

import pytest
from transformers import OlmoeConfig

from expertmesh.bench import decode
from expertmesh.bench.decode_model import SHAPES, Shape
from expertmesh.bench.measure import free_port
from tests.integration.served import command_line

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(400)]


def bench(*arguments: str) -> dict:
    command = command_line("bench", *arguments, "--json")
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_clients_stream_without_an_error_and_nothing_is_left_behind() -> None:
    report = bench("serve", "--clients", "8", "--seconds", "5", "--tokens", "24", "--port", str(free_port()))
    assert report["requests"] >= 8
    assert (report["errors"], report["first_errors"], report["left_behind"]) == (0, [], 0)
    assert 0 < report["time_to_first_token_ms"]["p50"] < 10_000
    assert report["growth_under_load"]["threads"] <= 4
    assert report["growth_under_load"]["descriptors"] <= 8


def test_the_exchange_is_compared_with_both_baselines_in_one_run() -> None:
    report = bench("exchange", "--rounds", "4", "--most-hosts", "2")
    sides = {"exchange", "exchange over gRPC", "raw local sockets", "bare gRPC stream", "Ray actor calls"}
    assert set(report["milliseconds"]) == sides
    assert report["exchange_over_grpc_over_bare"]["median"] > 0.9  # it does all that the bare stream does, and more
    assert report["exchange_over_raw"]["median"] > 1
    assert report["exchange_over_grpc_over_exchange"]["median"] > 1
    assert list(report["by_hosts"]["each_further_host"]) == ["2"]
    assert report["environment"]["command"] == "expertmesh bench exchange --rounds 4 --most-hosts 2 --json"


SMALL = Shape(
    description="small",
    config_class=OlmoeConfig,
    options={
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
)


def test_every_side_that_is_there_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)
    report = decode.run(shape="small", streams=[2], rounds=1, tokens=6, report=lambda progress: None)
    (row,) = report["streams"]
    sides = {decode.OURS, decode.HTTP, decode.CONTINUOUS, decode.PLAIN}
    assert set(row["tokens_per_second"]) | set(report["left_out"]) == sides | {decode.LLAMA}
    assert all(spread["median"] > 0 for spread in row["tokens_per_second"].values())
