"""What a run comes to, as JSON-able data and as text for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import yaml
from rich.table import Table

from expertmesh.bench.measure import environment
from expertmesh.bench.serve import percentiles
from expertmesh.chaos.history import quantile
from expertmesh.chaos.oracles import judge

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from expertmesh.chaos.history import History, Strike

BIN_S = 1.0
"""Of the throughput over time."""


def report_of(history: History, command: str) -> dict[str, Any]:
    """All figures of a run."""
    verdicts = judge(history)
    stalls_s = history.stalls_s()
    recoveries = history.recoveries_s()
    recovered = [took_s for took_s in recoveries if took_s is not None]
    failed = [answer.error for answer in history.answers if answer.error is not None]
    total = len(history.answers)
    since = [1e3 * gap for at_s, gap in history.gaps_s if at_s >= history.faults_from_s]
    return {
        "chaos": history.script.name,
        "seed": history.seed,
        "holds": all(verdict.holds is not False for verdict in verdicts),
        "oracles": [{"name": of.name, "holds": of.holds, "says": of.says} for of in verdicts],
        "clients": history.script.load.clients,
        "seconds": round(history.ended_s - history.faults_from_s, 1),
        "requests": total,
        "failed": len(failed),
        "first_failures": failed[:3],
        "success": round(1 - len(failed) / total, 6) if total else None,
        "faults": dict(Counter("+".join(strike.kinds) for strike in history.strikes)),
        "stall_s": _spread(stalls_s),
        "recovery_s": _spread(recovered) | {"never": len(recoveries) - len(recovered)},
        "settled_s": history.settled_s,
        "between_tokens_ms": {
            "usual": percentiles([1e3 * gap for gap in history.steady_gaps_s]),
            "since": percentiles(since),
        },
        "tokens_per_second": {
            "usual": round(history.tokens_per_second(history.steady_from_s, history.faults_from_s), 1),
            "since": round(history.tokens_per_second(history.faults_from_s, history.ended_s), 1),
            "every_s": BIN_S,
            "from_s": round(history.steady_from_s - history.faults_from_s, 2),
            "timeline": list(_timeline(history)),
        },
        "strikes": [_strike(strike, history) for strike in history.strikes],
        "footprint": _footprint(history),
        "environment": environment(command),
    }


def _spread(samples: list[float]) -> dict[str, float | None]:
    if not samples:
        return {"p50": None, "p99": None, "max": None}
    found = {"p50": quantile(samples, 0.5), "p99": quantile(samples, 0.99), "max": max(samples)}
    return {name: round(value, 3) for name, value in found.items()}


def _timeline(history: History) -> Iterator[float]:
    """Tokens per second in each bin, from the steady time on."""
    times_s = sorted(at_s for answer in history.answers for at_s in answer.times_s)
    counts = Counter(int((at_s - history.steady_from_s) / BIN_S) for at_s in times_s if at_s >= history.steady_from_s)
    for number in range(int((history.ended_s - history.steady_from_s) / BIN_S)):
        yield counts[number] / BIN_S


def _strike(strike: Strike, history: History) -> dict[str, Any]:
    return {
        "at_s": round(strike.at_s - history.faults_from_s, 3),
        "kinds": list(strike.kinds),
        "target": strike.target,
        "victim": strike.victim,
        "proof": strike.proof or None,
        "problem": strike.problem or None,
    }


def _footprint(history: History) -> dict[str, Any]:
    """First and last sample since the load is steady."""
    samples = [of for at_s, of in history.footprints if at_s >= history.steady_from_s]
    if not samples:
        return {}
    return {
        name: {role: {what: round(value, 1) for what, value in of.items()} for role, of in sample.items()}
        for name, sample in (("first", samples[0]), ("last", samples[-1]))
    }


def replayable(history: History) -> str:
    """The script of what was really done, up to its end: the same strikes at the same moments, on the same targets."""
    steps: list[dict[str, Any]] = []
    for strike in history.strikes:
        step = history.script.steps[strike.step]
        at = f"{strike.at_s - history.faults_from_s:.2f}s"
        if step.scale is not None:
            steps.append({"at": at, "scale": step.scale.model_dump(mode="json")})
            continue
        is_named = strike.hosts and step.target not in ("node", "every host")
        target = f"host {strike.target}" if is_named else step.target
        if step.target in ("node", "every host") and steps and steps[-1].get("of") == (strike.step, strike.turn):
            continue
        faults = [fault.model_dump(mode="json", exclude_defaults=True) for fault in step.faults]
        steps.append({"at": at, "target": target, "faults": faults, "of": (strike.step, strike.turn)})
    for of in steps:
        of.pop("of", None)
    values = yaml.safe_load(history.script.to_yaml()) | {"seed": history.seed, "steps": steps}
    values["duration"] = f"{history.ended_s - history.faults_from_s:.0f}s"
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def tables(report: dict[str, Any]) -> Iterator[RenderableType]:
    """For people."""
    figures = Table(box=None, show_header=False, title=_title(report), title_style="bold", title_justify="left")
    for name, text in _figures(report):
        figures.add_row(name, text, style=None)
    yield figures
    verdicts = Table(box=None, show_header=False)
    for of in report["oracles"]:
        mark = {True: "[green]✓[/]", False: "[bold red]✗[/]", None: "[dim]-[/]"}[of["holds"]]
        verdicts.add_row(mark, of["name"], of["says"])
    yield verdicts


def _title(report: dict[str, Any]) -> str:
    faults = ", ".join(f"{times} {kinds}" for kinds, times in report["faults"].items())
    return f"{report['chaos']}, seed {report['seed']}: {faults} in {report['seconds']:.0f} s"


def _figures(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    stall, recovery, tokens = report["stall_s"], report["recovery_s"], report["tokens_per_second"]
    usual, since = report["between_tokens_ms"]["usual"], report["between_tokens_ms"]["since"]
    yield "requests", f"{report['requests']} by {report['clients']} clients, {report['failed']} failed"
    if stall["p50"] is not None:
        yield "stall", f"p50 {stall['p50']:.3f} s, p99 {stall['p99']:.3f} s, max {stall['max']:.3f} s above the usual"
    if recovery["p50"] is not None:
        took = f"p50 {recovery['p50']:.1f} s, p99 {recovery['p99']:.1f} s, max {recovery['max']:.1f} s"
        yield "recovery", f"{took} to full coverage" + (f"; {recovery['never']} never" if recovery["never"] else "")
    yield "between tokens", f"p99 {since['p99']:.0f} ms, max {since['max']:.0f} ms; usually p99 {usual['p99']:.0f} ms"
    yield "tokens/s", f"{tokens['since']:,.0f}; usually {tokens['usual']:,.0f}"
