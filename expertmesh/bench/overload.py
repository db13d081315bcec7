"""`expertmesh bench overload`: three times as many requests as the mesh can answer, and what becomes of each.

First its peak: as many clients as the router decodes together, each asking again at once. Then an offered load that
does not wait for answers: requests arrive at random moments, at a multiple of the peak's rate, whatever happens to
those before. All clients stream over HTTP, from a process of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import httpx

from expertmesh.bench.crowd import Answer, Crowd, ask
from expertmesh.bench.measure import environment
from expertmesh.bench.serve import descendants, percentiles
from expertmesh.config import parse_config
from expertmesh.config_file import ServeFile
from expertmesh.deploy import deployed
from expertmesh.models import DOMAINS, heldout
from expertmesh.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection
    from pathlib import Path

AT_ONCE, QUEUE = 32, 32
"""Requests that the router decodes together, and that may wait for a place among them."""
PROMPT_CHARACTERS = 100
SETTLING_S = 4.0
"""Of each phase, until the batch is full, or the queue; not counted."""
REFUSED = (429, 503)


def run(
    *,
    times: float = 3.0,
    seconds: float = 30.0,
    tokens: int = 64,
    port: int,
    report: Callable[[Progress], None],
) -> dict[str, Any]:
    """Find the peak, offer `times` as much, each for so long: a JSON-able report."""
    prompts = [text[i : i + PROMPT_CHARACTERS] for text in map(heldout, DOMAINS) for i in range(0, 4_000, 500)]
    with deployed(_mesh(), port=port, report=report) as url:
        report(Progress(phase=f"{AT_ONCE} clients find the peak"))
        with Crowd(url, prompts, clients=AT_ONCE, tokens=tokens) as crowd:
            threading.Event().wait(SETTLING_S)
            began_s = time.perf_counter()
            threading.Event().wait(seconds)
            ended_s = time.perf_counter()
        peak = _tokens_per_s(crowd.answers, began_s, ended_s)
        rate = times * peak / tokens
        memory_before = _memory_mib()
        report(Progress(phase=f"{rate:.1f} requests/s are offered, {times:g} times the peak"))
        with _Memory() as memory:
            answers = offer(url, prompts, rate=rate, seconds=SETTLING_S + seconds, tokens=tokens)
    began_s = min(answer.started_s for answer in answers) + SETTLING_S
    goodput = _tokens_per_s([answer for answer in answers if answer.error is None], began_s, began_s + seconds)
    refused = [answer for answer in answers if answer.status in REFUSED]
    accepted = [answer for answer in answers if answer.error is None]
    failed = [answer.error for answer in answers if answer.error is not None and answer.status not in REFUSED]
    waits = [float(answer.retry_after) for answer in refused if answer.retry_after]
    return {
        "bench": "overload",
        "tokens_per_request": tokens,
        "peak_tokens_per_second": round(peak, 1),
        "offered_requests_per_second": round(rate, 2),
        "requests": len(answers),
        "goodput_tokens_per_second": round(goodput, 1),
        "goodput_over_peak": round(goodput / peak, 3),
        "accepted": {
            "requests": len(accepted),
            "time_to_first_token_ms": percentiles([1e3 * (a.times_s[0] - a.started_s) for a in accepted]),
            "whole_answer_ms": percentiles([1e3 * (a.ended_s - a.started_s) for a in accepted]),
        },
        "refused": {
            "requests": len(refused),
            "statuses": sorted({answer.status for answer in refused}),
            "without_retry_after": len(refused) - len(waits),
            "retry_after_s": percentiles(waits),
            "time_to_refuse_ms": percentiles([1e3 * (answer.ended_s - answer.started_s) for answer in refused]),
        },
        "failed": len(failed),
        "first_failures": failed[:3],
        "memory_mib": {
            name: {"at_peak": round(before, 1), "most_in_overload": round(memory.most.get(name, before), 1)}
            for name, before in memory_before.items()
        },
        "environment": environment(
            f"expertmesh bench overload --times {times:g} --seconds {seconds:g} --tokens {tokens} --json"
        ),
    }


def _mesh() -> ServeFile:
    router = {"max_requests": AT_ONCE, "max_queue": QUEUE, "cpus": 0.25}
    values = {"model": "tiny", "dtype": "float32", "pools": [{"hosts": 2, "cpus": 0.25}], "router": router}
    return ServeFile(serve={}, app_name="expertmesh", route_prefix="/", mesh=parse_config(values, "bench"))


def _tokens_per_s(answers: Sequence[Answer], began_s: float, ended_s: float) -> float:
    counted = sum(began_s <= at_s < ended_s for answer in answers for at_s in answer.times_s)
    return counted / (ended_s - began_s)


def offer(url: str, prompts: Sequence[str], *, rate: float, seconds: float, tokens: int, seed: int = 0) -> list[Answer]:
    """Send requests at `rate` per second for so many `seconds`, at the moments of a seeded Poisson process.

    What became of each, refused ones included, once the last has ended. A process of its own sends them.
    """
    rng = random.Random(seed)
    moments: list[float] = []
    while (at_s := (moments[-1] if moments else 0.0) + rng.expovariate(rate)) < seconds:
        moments.append(at_s)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, url, list(prompts), moments, tokens), name="offer")
    process.start()
    answers: list[Answer] = ours.recv()
    process.join()
    return answers


def _send(theirs: Connection, url: str, prompts: list[str], moments: list[float], tokens: int) -> None:
    """The process of an offer."""

    async def send_all() -> list[Answer]:
        async with contextlib.AsyncExitStack() as stack:
            # A client looks through all its connections at each event: one for hundreds would be what is overloaded.
            clients = [httpx.AsyncClient(base_url=url, timeout=120) for _ in range(AT_ONCE)]
            for client in clients:
                await stack.enter_async_context(client)
            began_s = time.perf_counter()

            async def send(number: int, at_s: float) -> Answer:
                await asyncio.sleep(began_s + at_s - time.perf_counter())
                return await ask(clients[number % len(clients)], prompts[number % len(prompts)], tokens)

            return await asyncio.gather(*(send(number, at_s) for number, at_s in enumerate(moments)))

    theirs.send(asyncio.run(send_all()))


@dataclass(slots=True)
class _Memory:
    """Samples what gateways and routers hold, while its context is open."""

    most: dict[str, float] = field(default_factory=dict)
    _end: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        assert self._thread is not None
        self._thread.join()

    def _sample(self) -> None:
        while not self._end.wait(1.0):
            for name, mib in _memory_mib().items():
                self.most[name] = max(mib, self.most.get(name, 0.0))


def _memory_mib() -> dict[str, float]:
    """What gateway and router hold, by name."""
    held: dict[str, float] = {}
    for folder in descendants(os.getpid()):
        try:
            title = (folder / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace")
            name = next((name for name in ("gateway", "router") if f":{name}" in title and "Replica" in title), None)
            if name is not None:
                held[name] = held.get(name, 0.0) + _anonymous_mib(folder)
        except OSError:
            continue  # it ended while we looked
    return held


def _anonymous_mib(folder: Path) -> float:
    lines = (folder / "status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))
