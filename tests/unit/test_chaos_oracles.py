"""Each oracle holds for a good run, and fails for one that is bad in just its respect."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from expertmesh.bench.crowd import Answer
from expertmesh.chaos.history import History, Strike
from expertmesh.chaos.oracles import judge
from expertmesh.chaos.report import replayable, report_of
from expertmesh.chaos.script import load_script, parse_script

RIGHT = {"a": [1, 2, 3, 4]}
MUST = {"stall_p50": "100ms", "stall_p99": "500ms", "gap_ratio": 2, "recovery": "5s", "throughput": 0.5}
MUST |= {"recovery_above_start": "1s"}
SCRIPT = parse_script(
    {
        "name": "test",
        "mesh": {},
        "duration": "400s",
        "steps": [{"faults": [{"kind": "kill"}], "every": "100s"}],
        "must": MUST | {"throughput_after": "10s"},
    },
    "test",
)
STEADY_S, FAULTS_S, END_S = 100.0, 200.0, 600.0
KILLS_S = (250.0, 350.0)


def answer(at_s: float, gap_s: float = 0.1, **changes: Any) -> Answer:
    ids = RIGHT["a"]
    return Answer("a", at_s, token_ids=list(ids), times_s=[at_s + gap_s * i for i in range(len(ids))], **changes)


def strike(at_s: float, **changes: Any) -> Strike:
    values = {"step": 0, "turn": int(at_s), "kinds": ("kill",), "target": "cpu-0", "hosts": ("cpu-0",), "deadly": True}
    return Strike(**(values | {"at_s": at_s, "proof": "process 7 has ended"} | changes))


def taking(**of: float) -> dict[str, dict[str, float]]:
    return {"routers": {"processes": 1, "memory_mib": 500.0, "threads": 40.0, "descriptors": 60.0} | of}


def looks(recovery_s: float = 1.0) -> list[tuple[float, bool, bool]]:
    times = [STEADY_S + 0.25 * i for i in range(int(4 * (END_S - STEADY_S)))]
    away = [any(kill <= at_s < kill + recovery_s for kill in KILLS_S) for at_s in times]
    return [(at_s, not is_away, not is_away) for at_s, is_away in zip(times, away, strict=True)]


GOOD = History(
    script=SCRIPT,
    seed=3,
    answers=[answer(STEADY_S + 0.5 * i) for i in range(int(2 * (END_S - STEADY_S)))],
    right=RIGHT,
    strikes=[strike(at_s) for at_s in KILLS_S],
    steady_from_s=STEADY_S,
    faults_from_s=FAULTS_S,
    ended_s=END_S,
    looks=looks(),
    settled_s=2.0,
    footprints=[(STEADY_S + i, taking()) for i in range(500)],
    starts_s=[3.0, 4.5],
)


def with_answers(*more: Answer) -> History:
    return replace(GOOD, answers=[*GOOD.answers, *more])


def growing(**of: float) -> History:
    samples = [(STEADY_S + i, taking(**{key: value * (1 + i / 500) for key, value in of.items()})) for i in range(500)]
    return replace(GOOD, footprints=samples)


NAMES = ["fired", "answered", "equal", "stall", "gaps", "recovery", "at once", "throughput", "whole", "leaks"]

LONG_STALLS = [Answer("a", at_s - 1, RIGHT["a"], [at_s - 1, at_s - 0.5, at_s + 1.5, at_s + 1.6]) for at_s in KILLS_S]
SLOWED = [answer(at_s, gap_s=0.3) for at_s in range(370, int(END_S))]
BAD = {
    "fired": replace(GOOD, strikes=[strike(KILLS_S[0]), strike(KILLS_S[1], proof="", problem="it has not ended")]),
    "answered": with_answers(Answer("a", 300.0, error="503: no host can serve expert 0:1")),
    "equal": with_answers(Answer("a", 300.0, [1, 2, 9, 4], [300.0, 300.1, 300.2, 300.3])),
    "stall": with_answers(*LONG_STALLS),
    "gaps": with_answers(*SLOWED),
    "recovery": replace(GOOD, looks=looks(recovery_s=6.0), starts_s=[5.5]),
    "at once": replace(GOOD, looks=looks(recovery_s=3.0), starts_s=[1.5]),
    "throughput": replace(GOOD, answers=[of for of in GOOD.answers if of.started_s < 300 or of.started_s % 4 == 0]),
    "whole": replace(GOOD, settled_s=None, unsettled="3 of 64 experts have fewer than 2 replicas"),
    "leaks": growing(memory_mib=500.0),
}


def test_a_good_run_passes_all() -> None:
    assert [(verdict.name, verdict.holds) for verdict in judge(GOOD)] == [(name, True) for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_each_oracle_can_fail_and_fails_alone(name: str) -> None:
    failed = {verdict.name: verdict.says for verdict in judge(BAD[name]) if verdict.holds is not True}
    assert set(failed) == {name}, failed


@pytest.mark.parametrize("what", ["threads", "descriptors"])
def test_threads_and_descriptors_may_not_grow_either(what: str) -> None:
    assert [of.name for of in judge(growing(**{what: 100.0})) if not of.holds] == ["leaks"]


def test_a_run_without_a_single_strike_proves_nothing() -> None:
    verdicts = {of.name: of.holds for of in judge(replace(GOOD, strikes=[]))}
    assert verdicts["fired"] is False


def test_what_the_script_waited_for_in_vain_fails_the_run() -> None:
    (verdict,) = [of for of in judge(replace(GOOD, stuck="step 0 waited 120 s")) if not of.holds]
    assert (verdict.name, "waited 120 s" in verdict.says) == ("fired", True)


def test_a_failed_answer_that_began_wrong_is_wrong_too() -> None:
    history = with_answers(Answer("a", 300.0, [1, 9], [300.0, 300.1], error="the connection broke"))
    assert {of.name for of in judge(history) if not of.holds} == {"answered", "equal"}


def test_a_short_run_does_not_judge_leaks() -> None:
    short = replace(BAD["leaks"], ended_s=STEADY_S + 60)
    assert {of.name: of.holds for of in judge(short)}["leaks"] is None


def test_the_stall_of_a_fault_is_the_longest_gap_after_it_above_the_usual() -> None:
    assert GOOD.stalls_s() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert BAD["stall"].stalls_s() == pytest.approx([1.9, 1.9])
    early = Answer("a", 248.0, RIGHT["a"], [240.0, 248.0, 249.0, 249.9])
    assert with_answers(early).stalls_s() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_recovery_is_counted_from_the_death_to_the_first_full_coverage_after_it() -> None:
    assert GOOD.recoveries_s() == [1.0, 1.0]
    never = replace(GOOD, looks=[look for look in GOOD.looks if look[0] < 300])
    assert never.recoveries_s() == [1.0, None]
    assert {of.name for of in judge(never) if not of.holds} == {"recovery", "at once"}


def test_of_several_deaths_in_a_row_the_last_one_counts_for_how_fast_a_host_comes() -> None:
    row = replace(GOOD, strikes=[strike(at_s) for at_s in (248.0, 249.0, *KILLS_S)], looks=looks(recovery_s=2.0))
    row = replace(row, looks=[look for look in row.looks if not 247.5 < look[0] < 252.0])
    assert row.recoveries_s() == [4.0, 3.0, 2.0, 2.0]
    assert row.last_recoveries_s() == [2.0, 2.0]


def test_the_report_says_what_was_seen() -> None:
    report = report_of(BAD["stall"], "expertmesh chaos run test")
    assert (report["holds"], report["failed"], report["requests"]) == (False, 0, 1002)
    assert report["stall_s"] == {"p50": 1.9, "p99": 1.9, "max": 1.9}
    assert report["recovery_s"] == {"p50": 1.0, "p99": 1.0, "max": 1.0, "never": 0}
    assert len(report["tokens_per_second"]["timeline"]) == END_S - STEADY_S
    assert report["tokens_per_second"]["usual"] == pytest.approx(8, rel=0.02)
    assert [of["at_s"] for of in report["strikes"]] == [50.0, 150.0]


def test_a_run_can_be_written_as_a_script_that_does_the_same(tmp_path) -> None:
    path = tmp_path / "again.yaml"
    path.write_text(replayable(GOOD))
    again = load_script(str(path))
    assert [(step.at, step.target, step.faults[0].kind) for step in again.steps] == [
        (50.0, "host cpu-0", "kill"),
        (150.0, "host cpu-0", "kill"),
    ]
    assert (again.seed, again.duration, again.must) == (3, 400.0, SCRIPT.must)
