"""`expertmesh bench serve`: many clients stream from the tiny model, over HTTP, as users would.

Reports time to first token and between tokens as the clients see them, errors, and what is left behind: growth of the
processes' memory, threads and file descriptors under load, and processes after shutdown.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from expertmesh.bench.crowd import chunks, token_ids
from expertmesh.bench.measure import environment
from expertmesh.deploy import deployed, for_model
from expertmesh.exposure import HAPROXY_SWITCH
from expertmesh.models import DOMAINS, heldout
from expertmesh.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PROMPT_CHARACTERS = 120
WARM_UP_S = 8.0


@dataclass(slots=True)
class Outcome:
    """What the clients saw."""

    first_ms: list[float] = field(default_factory=list)
    between_ms: list[float] = field(default_factory=list)
    requests: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of all processes below this one that run our code."""

    processes: int
    memory_mib: float
    threads: int
    descriptors: int


def run(*, clients: int, seconds: float, tokens: int, port: int, report: Callable[[Progress], None]) -> dict[str, Any]:
    """Serve, load for `seconds`, stop: a JSON-able report."""
    with deployed(for_model("tiny", hosts=2, min_replicas=1, dtype="float32"), port=port, report=report) as url:
        report(Progress(phase="warming up"))
        asyncio.run(_load(url, clients, WARM_UP_S, tokens))
        before = footprint()
        report(Progress(phase=f"{clients} clients stream for {seconds:g} s"))
        outcome = asyncio.run(_load(url, clients, seconds, tokens))
        after = footprint()
        report(Progress(phase="stopping"))
    left = footprint()
    told = f"{HAPROXY_SWITCH}=1 " if os.environ.get(HAPROXY_SWITCH) == "1" else ""
    return {
        "bench": "serve",
        "clients": clients,
        "seconds": seconds,
        "tokens_per_request": tokens,
        "requests": outcome.requests,
        "errors": len(outcome.errors),
        "first_errors": outcome.errors[:3],
        "tokens_per_second": round(outcome.tokens / seconds, 1),
        "time_to_first_token_ms": percentiles(outcome.first_ms),
        "between_tokens_ms": percentiles(outcome.between_ms),
        "growth_under_load": {
            "memory_mib": round(after.memory_mib - before.memory_mib, 1),
            "threads": after.threads - before.threads,
            "descriptors": after.descriptors - before.descriptors,
        },
        "left_behind": left.processes,
        "environment": environment(f"{told}expertmesh bench serve --clients {clients} --seconds {seconds:g} --json"),
    }


async def _load(url: str, clients: int, seconds: float, tokens: int) -> Outcome:
    """Each client sends one request after the other until time is up; those under way are finished."""
    outcome = Outcome()
    texts = [heldout(domain) for domain in DOMAINS]
    until = time.perf_counter() + seconds
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:

        async def client(number: int) -> None:
            for turn in range(1_000_000):
                if time.perf_counter() >= until:
                    return
                text = texts[number % len(texts)]
                start = (number * 977 + turn * 331) % (len(text) - PROMPT_CHARACTERS)
                prompt = text[start : start + PROMPT_CHARACTERS]
                await _request(http, prompt, tokens, seed=number, outcome=outcome)

        await asyncio.gather(*(client(number) for number in range(clients)))
    return outcome


async def _request(http: httpx.AsyncClient, prompt: str, tokens: int, seed: int, outcome: Outcome) -> None:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "seed": seed, "stream": True, "ignore_eos": True}
    body["return_token_ids"] = True
    started = last = time.perf_counter()
    received = 0
    outcome.requests += 1
    try:
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                outcome.errors.append(f"{answer.status_code}: {(await answer.aread()).decode()[:200]}")
                return
            async for chunk in chunks(answer):
                if "error" in chunk:
                    outcome.errors.append(str(chunk["error"]))
                    return
                count = len(token_ids(chunk))
                if not count:
                    continue
                now = time.perf_counter()
                if received:
                    outcome.between_ms.append(1e3 * (now - last) / count)
                else:
                    outcome.first_ms.append(1e3 * (now - last))
                last, received = now, received + count
    except httpx.HTTPError as error:
        outcome.errors.append(f"{type(error).__name__}: {error}")
        return
    outcome.tokens += received
    if received != tokens:
        outcome.errors.append(f"{received} tokens came instead of {tokens} in {time.perf_counter() - started:.1f} s")


def percentiles(samples: list[float]) -> dict[str, float]:
    """p50, p90, p99 and the greatest."""
    if not samples:
        return {"p50": float("nan"), "p90": float("nan"), "p99": float("nan"), "max": float("nan")}
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {
        "p50": round(ordered[round(0.5 * last)], 2),
        "p90": round(ordered[round(0.9 * last)], 2),
        "p99": round(ordered[round(0.99 * last)], 2),
        "max": round(ordered[-1], 2),
    }


def footprint() -> Footprint:
    """Of every process of this user that runs a part of a mesh: hosts, routers, gateways, Ray's own."""
    processes, memory, threads, descriptors = 0, 0.0, 0, 0
    for folder in descendants(os.getpid()):
        try:
            lines = (folder / "status").read_text().splitlines()
            values = dict(line.split(":", 1) for line in lines if ":" in line)
            memory += int(values.get("RssAnon", "0 kB").split()[0]) / 1024
            threads += int(values["Threads"])
            descriptors += len(list((folder / "fd").iterdir()))
            processes += 1
        except (OSError, KeyError):
            continue  # it ended while we looked
    return Footprint(processes, memory, threads, descriptors)


def descendants(root: int) -> Iterable[Path]:
    """The /proc folders of all processes started by `root`, and by those."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    for process in parents:
        ancestor = process
        while ancestor in parents and ancestor != root:
            ancestor = parents[ancestor]
        if ancestor == root and process != root:
            yield Path("/proc") / str(process)
