"""What must hold of a run, each as a pure function of its history. An oracle that could not see enough says so."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertmesh.chaos.history import quantile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from expertmesh.chaos.history import History

LEAK_FROM_S = 120.0
"""In a shorter run, what processes take while they warm up cannot be told from a leak."""
MOST_GROWTH = {"memory_mib": (1.15, 24.0), "threads": (1.1, 4.0), "descriptors": (1.15, 12.0)}
"""From the first third of a run to the last: times so much, and so much more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one oracle says."""

    name: str
    holds: bool | None
    """None: this run cannot tell."""
    says: str


def judge(history: History) -> list[Verdict]:
    """All oracles that the script asks for."""
    return [verdict for oracle in ORACLES if (verdict := oracle(history)) is not None]


def fired(history: History) -> Verdict:
    """As many faults really happened as must."""
    open_ones = [strike for strike in history.strikes if not strike.proof]
    says = f"{len(history.strikes) - len(open_ones)} of {len(history.strikes)} strikes are proven"
    if open_ones:
        first = open_ones[0]
        says += f"; not: {'+'.join(first.kinds)} on {first.target} ({first.problem or 'no sign of it was seen'})"
    if history.stuck:
        says += f"; {history.stuck}"
    share = 1 - len(open_ones) / len(history.strikes) if history.strikes else 0.0
    return Verdict(name="fired", holds=share >= history.script.must.fired and not history.stuck, says=says)


def answered(history: History) -> Verdict:
    """As many requests succeed as must."""
    failed = [answer.error for answer in history.answers if answer.error is not None]
    total = len(history.answers)
    share = 1 - len(failed) / total if total else 0.0
    says = f"{total - len(failed)} of {total} requests ({share:.3%}) were answered"
    if failed:
        says += f"; the first that was not: {failed[0]}"
    return Verdict(name="answered", holds=total > 0 and share >= history.script.must.success, says=says)


def equal(history: History) -> Verdict:
    """Every answer is the undisturbed one, token by token; what came of a failed one, too."""
    wrong = [
        answer
        for answer in history.answers
        if list(answer.token_ids) != list(history.right[answer.prompt])[: len(answer.token_ids)]
    ]
    says = f"{len(history.answers) - len(wrong)} of {len(history.answers)} answers are as undisturbed"
    if wrong:
        says += f"; the first that is not was to {wrong[0].prompt[:40]!r}"
    return Verdict(name="equal", holds=not wrong, says=says)


def stalled(history: History) -> Verdict | None:
    """Streams pause no longer than they may."""
    must, stalls_s = history.script.must, history.stalls_s()
    if must.stall_p50 is None and must.stall_p99 is None:
        return None
    if not history.steady_gaps_s or not stalls_s:
        return Verdict(name="stall", holds=None, says="nothing to compare with")
    p50_s, p99_s = quantile(stalls_s, 0.5), quantile(stalls_s, 0.99)
    allowed = [(p50_s, must.stall_p50), (p99_s, must.stall_p99)]
    says = f"p50 {p50_s:.3f} s, p99 {p99_s:.3f} s, at most {max(stalls_s):.3f} s above the usual"
    return Verdict(name="stall", holds=all(most is None or is_s <= most for is_s, most in allowed), says=says)


def smooth(history: History) -> Verdict | None:
    """Tokens come nearly as regularly as undisturbed."""
    if (most := history.script.must.gap_ratio) is None:
        return None
    usual_s = quantile(history.steady_gaps_s, 0.99)
    since_s = quantile([gap for at_s, gap in history.gaps_s if at_s >= history.faults_from_s], 0.99)
    if not usual_s or not since_s:
        return Verdict(name="gaps", holds=None, says="nothing to compare with")
    says = f"p99 {1e3 * since_s:.0f} ms between tokens, {since_s / usual_s:.2f} times the usual; allowed {most:g}"
    return Verdict(name="gaps", holds=since_s <= most * usual_s, says=says)


def recovered(history: History) -> Verdict | None:
    """Each death is made good in time."""
    if (most_s := history.script.must.recovery) is None:
        return None
    recoveries = history.recoveries_s()
    if not recoveries:
        return Verdict(name="recovery", holds=None, says="no host died")
    known, never = _known(recoveries)
    says = f"full coverage after p50 {quantile(known, 0.5):.1f} s, at most {max(known, default=0.0):.1f} s"
    says += f"; never after {never} deaths" if never else ""
    return Verdict(name="recovery", holds=not never and max(known) <= most_s, says=says)


def recovered_at_once(history: History) -> Verdict | None:
    """Deaths, however many in a row, are made good as fast as a host can start and load."""
    if (most_s := history.script.must.recovery_above_start) is None:
        return None
    recoveries, starts_s = history.last_recoveries_s(), history.starts_s
    if not recoveries or not starts_s:
        return Verdict(name="at once", holds=None, says="no host died, or none came")
    known, never = _known(recoveries)
    says = f"full coverage at most {max(known, default=0.0):.1f} s after the last death of each series; "
    says += f"to start a host and load it took p50 {quantile(starts_s, 0.5):.1f} s, at most {max(starts_s):.1f} s"
    says += f"; never after {never} series" if never else ""
    return Verdict(name="at once", holds=not never and max(known) <= max(starts_s) + most_s, says=says)


def _known(recoveries: Sequence[float | None]) -> tuple[list[float], int]:
    """The recoveries that came to their end, and how many never did."""
    known = [took_s for took_s in recoveries if took_s is not None]
    return known, len(recoveries) - len(known)


def fast(history: History) -> Verdict | None:
    """What is left of the mesh does its part."""
    must = history.script.must
    if must.throughput is None:
        return None
    usual = history.tokens_per_second(history.steady_from_s, history.faults_from_s)
    from_s = max((strike.at_s for strike in history.strikes), default=history.faults_from_s) + must.throughput_after
    if not usual or from_s >= history.ended_s:
        return Verdict(name="throughput", holds=None, says="nothing to compare with")
    then = history.tokens_per_second(from_s, history.ended_s)
    says = f"{then:.0f} tokens/s, {then / usual:.1%} of the usual {usual:.0f}; it must be {must.throughput:.1%}"
    return Verdict(name="throughput", holds=then >= must.throughput * usual, says=says)


def converged(history: History) -> Verdict:
    """In the end nothing is missing and nothing is left over."""
    if history.settled_s is None:
        return Verdict(name="whole", holds=False, says=history.unsettled)
    return Verdict(name="whole", holds=True, says=f"the mesh was whole {history.settled_s:.1f} s after the last fault")


def tight(history: History) -> Verdict:
    """Nothing grows: medians of the first third of the run against those of the last."""
    took_s = history.ended_s - history.steady_from_s
    samples = [(at_s, of) for at_s, of in history.footprints if at_s >= history.steady_from_s]
    if took_s < LEAK_FROM_S or len(samples) < 9:
        return Verdict(name="leaks", holds=None, says=f"a run of {took_s:.0f} s is too short to tell")
    third = len(samples) // 3
    grown, checked = [], []
    for role in samples[-1][1]:
        for what, (times, more) in MOST_GROWTH.items():
            early, late = (
                [of[role][what] for _, of in part if role in of] for part in (samples[:third], samples[-third:])
            )
            if not early or not late:
                continue
            before, after = statistics.median(early), statistics.median(late)
            checked.append(f"{role} {what} {before:.0f} to {after:.0f}")
            if after > before * times + more:
                grown.append(checked[-1])
    return Verdict(name="leaks", holds=not grown and bool(checked), says="; ".join(grown or checked))


ORACLES: Sequence[Callable[[History], Verdict | None]] = (
    fired,
    answered,
    equal,
    stalled,
    smooth,
    recovered,
    recovered_at_once,
    fast,
    converged,
    tight,
)
