"""The CPU kernel's bench, at a size that takes no time: what it reports adds up, and can be drawn."""

from __future__ import annotations

import pytest

from expertmesh.bench import kernel
from expertmesh.bench.kernel import BATCHED, EAGER, GROUPED, LOOP, LOOP_FLOAT32, OURS, Shape

SHAPE = Shape(experts=4, hidden=64, intermediate=32, top_k=2)


@pytest.fixture(scope="module")
def report():
    return kernel.run(rounds=2, shapes=[SHAPE], tokens=[1, 16])


def test_every_side_is_measured_at_every_size(report):
    for at in report["shapes"][0]["at"]:
        assert set(at["milliseconds"]) == {OURS, GROUPED, BATCHED, EAGER, LOOP, LOOP_FLOAT32}
        assert set(at["times_as_fast_as"]) == set(at["milliseconds"]) - {OURS}


def test_only_the_experts_that_are_used_count_as_read(report):
    one, many = report["shapes"][0]["at"]
    assert one["active_bytes"] == SHAPE.top_k * SHAPE.spec.num_bytes
    assert many["active_bytes"] == SHAPE.experts * SHAPE.spec.num_bytes


def test_what_would_copy_too_much_is_left_out(monkeypatch):
    monkeypatch.setattr(kernel, "MAX_COPIED_BYTES", SHAPE.top_k * SHAPE.spec.num_bytes)
    one, two = kernel.run(rounds=2, shapes=[SHAPE], tokens=[1, 2])["shapes"][0]["at"]
    assert BATCHED in one["milliseconds"]
    assert BATCHED not in two["milliseconds"]


def test_sides_that_do_not_agree_are_not_compared(monkeypatch):
    honest = kernel._layer
    monkeypatch.setattr(kernel, "_layer", lambda k: lambda *arguments: honest(k)(*arguments) + 1.0)
    with pytest.raises(AssertionError, match="not close"):
        kernel.run(rounds=2, shapes=[SHAPE], tokens=[1])


def test_the_report_is_drawn(report, tmp_path):
    path = tmp_path / "kernel.svg"
    kernel.draw(report, path)
    assert "<!-- times as fast as -->" in path.read_text()
