"""`expertmesh trace make` and `simulate`, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expertmesh.cli.trace_report import sparkline
from expertmesh.trace.format import TraceHeader, TraceReader, encode_header

SMALL = ("--layers", 2, "--experts", 16, "--top-k", 2, "--windows", 12, "--window", 60)


def test_a_made_trace_is_a_trace(trace_command, tmp_path: Path) -> None:
    path = tmp_path / "x.trace"
    assert trace_command("make", "bursts", "-o", path, *SMALL)[0] == 0
    reader = TraceReader(path)
    assert reader.header.num_experts == (16, 16)
    assert len(list(reader)) == 24


def test_simulate_compares_the_strategies(trace_command, tmp_path: Path) -> None:
    path = tmp_path / "x.trace"
    trace_command("make", "drift", "-o", path, *SMALL)
    code, out, _ = trace_command("simulate", path, "--hosts", 4, "--slow", 0.5)
    assert code == 0
    for name in ("static", "once", "ours"):
        assert any(line.startswith(name) and "▁" <= line[-1] <= "█" for line in out.splitlines())
    code, out, _ = trace_command("simulate", path, "--hosts", 4, "--json")
    result = json.loads(out)
    assert (code, result["windows"], result["hosts"]) == (0, 12, 4)
    assert len(result["series"]["ours"]["imbalance"]) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("make", "weather", "-o", "{}/y"), "kind: 'weather' is none of zipf, drift, bursts, diurnal, topics"),
        (("make", "zipf", "-o", "{}/y", "--windows", 0), "windows: 0"),
        (("make", "zipf", "-o", "{}/none/y"), "output: {}/none/y: No such file"),
        (("simulate", "{}/none"), "{}/none: No such file"),
        (("simulate", "{}/empty"), "it is empty"),
        (("simulate", "{}/text"), "not an expertmesh trace"),
        (("simulate", "{}/no-load"), "the trace holds no load"),
        (("simulate", "{}/no-load", "--window", 0), "window_s: 0"),
        (("simulate", "{}/no-load", "--hosts", 0), "hosts: 0"),
        (("simulate", "{}/no-load", "--inventory", "{}/none"), "inventory: {}/none: No such file"),
        (("record", "-o", "{}/y", "--seconds", 0), "seconds: 0"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(trace_command, tmp_path: Path, arguments: tuple, message: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("hello, world")
    (tmp_path / "no-load").write_bytes(encode_header(TraceHeader(model="m", num_experts=(4,), top_k=1, content="rows")))
    code, out, err = trace_command(*(str(argument).format(tmp_path) for argument in arguments))
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert message.format(tmp_path) in err
    assert not (tmp_path / "y").exists()


def test_a_sparkline_spans_low_to_high_and_fits_a_line() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 0, 7) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5], 5, 5) == "▁▁"
    assert len(sparkline(list(range(1000)), 0, 1000)) == 72
