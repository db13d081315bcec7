"""`expertmesh bench elastic`: what a mesh does when its load changes, and what its clients notice of it.

`shift`: the topic of all requests changes at once, so that other experts are hot. `resize`: the pool grows from two
hosts to four and back. Both on the tiny model, over HTTP, every answer compared with an undisturbed one.
"""

from __future__ import annotations

import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

from expertmesh.bench.crowd import Crowd, undisturbed, verdict
from expertmesh.bench.measure import environment
from expertmesh.bench.serve import percentiles
from expertmesh.client import fetch, order
from expertmesh.config import parse_config
from expertmesh.config_file import ServeFile
from expertmesh.deploy import deployed
from expertmesh.models import DOMAINS, heldout
from expertmesh.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

TOKENS = 48
PROMPT_CHARACTERS = 100
BALANCED = 1.15
"""The slowest host's time over the mean that counts as balanced."""
WINDOW = 6
"""Samples, of half a second, over which rows are counted: a batch of few tokens is level only on average."""


def run(*, port: int, report: Callable[[Progress], None]) -> dict[str, Any]:
    """Both stories, one after the other: a JSON-able report."""
    return {
        "bench": "elastic",
        "shift": shift(port=port, report=report),
        "resize": resize(port=port, report=report),
        "environment": environment("expertmesh bench elastic --json"),
    }


def _mesh(hosts: int, most: int, **experts: Any) -> ServeFile:
    """The tiny model on host processes with a few spare slots each."""
    pool = {"hosts": hosts, "min": hosts, "max": most, "cpus": 0.25, "memory": "10MiB", "standby": most - hosts}
    values = {"model": "tiny", "dtype": "float32", "pools": [pool], "experts": experts}
    return ServeFile(serve={}, app_name="expertmesh", route_prefix="/", mesh=parse_config(values, "bench"))


def _prompts(domain: str) -> list[str]:
    text = heldout(domain)
    return [text[start : start + PROMPT_CHARACTERS] for start in range(0, 12 * 977, 977)]


# --- the topic shifts ------------------------------------------------------------------------------------------------


def shift(
    *, port: int, report: Callable[[Progress], None], clients: int = 8, before_s: float = 20.0, after_s: float = 20.0
) -> dict[str, Any]:
    """Load in one domain, then in another."""
    first, second = _prompts(DOMAINS[0]), _prompts(DOMAINS[-1])
    with deployed(_mesh(4, 4, half_life_s=2.0, replan_s=1.0), port=port, report=report) as url:
        report(Progress(phase="asking each prompt once, undisturbed"))
        right = undisturbed(url, first + second, TOKENS)
        with Crowd(url, first, clients=clients, tokens=TOKENS) as crowd:
            report(Progress(phase=f"{clients} clients ask in one domain for {before_s:g} s"))
            pause = threading.Event()
            pause.wait(before_s)
            before, loads_before = _replicas(url), fetch(url, "/mesh/load")["per_second"]
            report(Progress(phase=f"the topic shifts; {after_s:g} s more"))
            crowd.ask_for(second)
            began_s = time.perf_counter()
            timeline, samples = [], [_Rows(url)]
            while (at_s := time.perf_counter() - began_s) < after_s:
                pause.wait(0.5)
                samples.append(_Rows(url))
                imbalance = samples[-1].imbalance_since(samples[max(0, len(samples) - 1 - WINDOW)])
                timeline.append({"at_s": round(at_s, 2), "imbalance": imbalance})
            after, loads_after = _replicas(url), fetch(url, "/mesh/load")["per_second"]
            decisions = [entry["why"] for entry in fetch(url, "/mesh/decisions") if entry["what"] == "plan"]
    moved = _follow(before, after, loads_before, loads_after)
    return {
        "clients": clients,
        "hosts": 4,
        **verdict(crowd.answers, right),
        "balanced_after_s": _settled(timeline),
        "hot_experts": moved["hot"],
        "cold_experts": moved["cold"],
        "timeline": timeline,
        "plans": len(decisions),
    }


class _Rows:
    """What all hosts had computed at one moment, and how fast they are."""

    def __init__(self, url: str) -> None:
        hosts = fetch(url, "/mesh/hosts")
        self.rows = {host["id"]: host["rows"] for host in hosts}
        self.rates = {host["id"]: host["rate"] for host in hosts}

    def imbalance_since(self, earlier: _Rows) -> float | None:
        """The slowest host's time over the mean: rows since then at measured rates. None: nobody computed any."""
        times = [(rows - earlier.rows.get(host, 0)) / self.rates[host] for host, rows in self.rows.items()]
        mean = statistics.mean(times)
        return round(max(times) / mean, 3) if mean else None


def _replicas(url: str) -> dict[tuple[int, int], int]:
    counts: dict[tuple[int, int], int] = {}
    for host in fetch(url, "/mesh/placement")["hosts"]:
        for layer, expert in host["experts"]:
            counts[layer, expert] = counts.get((layer, expert), 0) + 1
    return counts


def _follow(
    before: dict[tuple[int, int], int],
    after: dict[tuple[int, int], int],
    loads_before: list[list[float]],
    loads_after: list[list[float]],
) -> dict[str, dict[str, int]]:
    """Of the experts whose share of their layer at least doubled, or halved: how many gained and lost replicas."""
    found = {
        kind: {"experts": 0, "gained": 0, "lost": 0, "replicas_before": 0, "replicas_after": 0}
        for kind in ("hot", "cold")
    }
    for layer, (earlier, later) in enumerate(zip(loads_before, loads_after, strict=True)):
        for expert, (was, now) in enumerate(zip(earlier, later, strict=True)):
            was_share, share, even = was / (sum(earlier) or 1), now / (sum(later) or 1), 1 / len(later)
            if share > 2 * was_share and share > even:
                kind = "hot"
            elif was_share > 2 * share and was_share > even:
                kind = "cold"
            else:
                continue
            had, has = before[layer, expert], after[layer, expert]
            of = found[kind]
            of["experts"] += 1
            of["gained"] += has > had
            of["lost"] += has < had
            of["replicas_before"] += had
            of["replicas_after"] += has
    return found


def _settled(timeline: list[dict[str, Any]]) -> float | None:
    """From when on the imbalance stays below `BALANCED`; None: it does not."""
    late = [i for i, entry in enumerate(timeline) if (entry["imbalance"] or 1.0) >= BALANCED]
    first = late[-1] + 1 if late else 0
    return timeline[first]["at_s"] if first < len(timeline) else None


# --- the pool grows and shrinks --------------------------------------------------------------------------------------


def resize(
    *, port: int, report: Callable[[Progress], None], clients: int = 8, peak_s: float = 10.0, steady_s: float = 20.0
) -> dict[str, Any]:
    """At half of the peak load: two hosts, four, two."""
    prompts = [prompt for domain in DOMAINS for prompt in _prompts(domain)[:4]]
    with deployed(_mesh(2, 4, half_life_s=2.0, replan_s=1.0), port=port, report=report) as url:
        right = undisturbed(url, prompts, TOKENS)
        pause = threading.Event()
        report(Progress(phase="finding the peak"))
        with Crowd(url, prompts, clients=clients, tokens=TOKENS) as peak:
            pause.wait(peak_s)
        per_second = sum(len(answer.token_ids) for answer in peak.answers) / peak_s
        period_s = clients * TOKENS / (per_second / 2)
        with Crowd(url, prompts, clients=clients, tokens=TOKENS, period_s=period_s) as crowd:
            pause.wait(period_s)  # let the requests spread out
            report(Progress(phase="half the peak, two hosts"))
            began_s = time.perf_counter()
            pause.wait(steady_s)
            moves_from_s = time.perf_counter()
            report(Progress(phase="growing to four hosts"))
            grown = _scale(url, 4)
            pause.wait(5.0)
            report(Progress(phase="shrinking to two hosts"))
            shrunk = _scale(url, 2)
            moves_to_s = time.perf_counter()
        starts = _starts(url)
    steady = _between(crowd, began_s, moves_from_s)
    moving = _between(crowd, moves_from_s, moves_to_s)
    return {
        "clients": clients,
        "peak_tokens_per_second": round(per_second, 1),
        **verdict(crowd.answers, right),
        "seconds_to_grow": round(grown, 2),
        "seconds_to_shrink": round(shrunk, 2),
        "seconds_from_decision_to_first_row": starts,
        "steady": steady,
        "moving": moving,
        "longest_pause_above_steady_p99_ms": round(
            moving["between_tokens_ms"]["max"] - steady["between_tokens_ms"]["p99"], 1
        ),
        "throughput_moving_over_steady": round(moving["tokens_per_second"] / steady["tokens_per_second"], 3),
    }


def _scale(url: str, hosts: int) -> float:
    """Seconds until the pool has so many hosts, all of them at work."""
    order(url, "scale", pool="cpu", hosts=hosts)
    began_s, pause = time.perf_counter(), threading.Event()
    while time.perf_counter() - began_s < 120:
        now = fetch(url, "/mesh/hosts")
        if len(now) == hosts and all(host["state"] == "ready" and host.get("rows") for host in now):
            break
        pause.wait(0.1)
    return time.perf_counter() - began_s


def _starts(url: str) -> list[float]:
    """Of each host that was added, the seconds from the decision to its first row."""
    decisions = fetch(url, "/mesh/decisions")
    decided = {entry["host"]: entry["time"] for entry in decisions if entry["what"] == "start host"}
    served = {entry["host"]: entry["time"] for entry in decisions if entry["what"] == "first row"}
    return [round(served[host] - at, 2) for host, at in decided.items() if host in served]


def _between(crowd: Crowd, from_s: float, to_s: float) -> dict[str, Any]:
    """What clients saw from one moment to another."""
    gaps = [(at, gap) for answer in crowd.answers for at, gap in answer.gaps_s if from_s <= at < to_s]
    tokens = sum(from_s <= at < to_s for answer in crowd.answers for at in answer.times_s)
    return {
        "seconds": round(to_s - from_s, 1),
        "tokens_per_second": round(tokens / (to_s - from_s), 1),
        "between_tokens_ms": percentiles([1e3 * gap for _, gap in gaps]),
    }
