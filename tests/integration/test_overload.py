"""Three times as many requests as a mesh can answer: a short form of `expertmesh bench overload`."""

from __future__ import annotations

import pytest

from expertmesh.bench.measure import free_port
from expertmesh.bench.overload import AT_ONCE, QUEUE, run

pytestmark = [pytest.mark.ray, pytest.mark.long]


def test_what_is_too_much_is_refused_at_once_and_the_rest_is_answered_as_ever() -> None:
    report = run(times=3, seconds=8, tokens=48, port=free_port(), report=lambda progress: None)
    assert (report["failed"], report["first_failures"]) == (0, [])
    refused, accepted = report["refused"], report["accepted"]
    assert refused["requests"] + accepted["requests"] == report["requests"]
    assert refused["requests"] > report["requests"] / 4
    assert set(refused["statuses"]) <= {429, 503}
    assert refused["without_retry_after"] == 0
    assert refused["time_to_refuse_ms"]["p50"] < 500
    assert refused["time_to_refuse_ms"]["p50"] < accepted["time_to_first_token_ms"]["p50"]
    # The clients take their share of the same cores; the bench, at leisure, holds the mesh to 0.9.
    assert report["goodput_over_peak"] > 0.5
    for held in report["memory_mib"].values():
        assert held["most_in_overload"] - held["at_peak"] < (AT_ONCE + QUEUE) * 2, (
            "it grew by more than its queue holds"
        )
