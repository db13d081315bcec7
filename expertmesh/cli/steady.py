"""A small steady load: a few clients that stream the same prompts over and over, and keep what they saw.

Knows a mesh by its HTTP alone. Invariant: every request that was begun ends up in `outcomes`, answered or failed.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx

from expertmesh.clock import Clock

TOKENS = 48


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One request, as its client saw it."""

    prompt: str
    token_ids: list[int] = field(default_factory=list)
    longest_wait_s: float = 0.0
    """For its next token."""
    error: str = ""
    was_struck: bool = False
    """Whether it was streaming at the moment of `SteadyLoad.strike`."""


def stream(client: httpx.Client, url: str, **body: Any) -> Iterator[dict[str, Any]]:
    """The choices of a completion as they arrive. Raises ValueError, with what the mesh says, or httpx.HTTPError."""
    with client.stream("POST", f"{url}/v1/completions", json={"model": "tiny", "stream": True, **body}) as answer:
        if answer.is_error:
            raise ValueError(answer.read().decode())
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if line.startswith("data: ") and data != "[DONE]":
                chunk = json.loads(data)
                if "error" in chunk:
                    raise ValueError(chunk["error"]["message"])
                yield from chunk["choices"]


class SteadyLoad:
    """Runs while it is entered. Greedy, so that equal prompts must have equal answers."""

    def __init__(self, url: str, prompts: Sequence[str], *, clients: int, clock: Clock) -> None:
        self.outcomes: list[Outcome] = []
        """Of the requests that have ended, in that order."""
        self._url = url
        self._prompts = itertools.cycle(prompts)
        self._clock = clock
        self._running: list[Outcome] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on, name=f"client-{i}") for i in range(clients)]

    def turn_to(self, prompts: Sequence[str]) -> None:
        """Ask these from now on."""
        with self._lock:
            self._prompts = itertools.cycle(prompts)

    @property
    def num_streaming(self) -> int:
        """Requests that have tokens and wait for more."""
        with self._lock:
            return len(self._midway())

    def strike(self) -> int:
        """Mark the requests that are streaming now; how many they are."""
        with self._lock:
            struck = self._midway()
            for outcome in struck:
                outcome.was_struck = True
            return len(struck)

    def _midway(self) -> list[Outcome]:
        return [outcome for outcome in self._running if 0 < len(outcome.token_ids) < TOKENS]

    def _ask_on(self) -> None:
        with httpx.Client(timeout=120) as client:
            while not self._stopped.is_set():
                with self._lock:
                    outcome = Outcome(prompt=next(self._prompts))
                    self._running.append(outcome)
                ask(client, self._url, outcome, self._clock)
                with self._lock:
                    self._running.remove(outcome)
                    self.outcomes.append(outcome)

    def __enter__(self) -> SteadyLoad:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


def ask(client: httpx.Client, url: str, outcome: Outcome, clock: Clock) -> None:
    """Fill in what becomes of a request."""
    last_s = clock.monotonic()
    options = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    try:
        for choice in stream(client, url, prompt=outcome.prompt, **options):
            now_s = clock.monotonic()
            outcome.longest_wait_s = max(outcome.longest_wait_s, now_s - last_s)
            last_s = now_s
            outcome.token_ids += choice["token_ids"]
        if len(outcome.token_ids) != TOKENS:
            outcome.error = f"it ended after {len(outcome.token_ids)} tokens"
    except (httpx.HTTPError, ValueError) as error:
        outcome.error = str(error) or type(error).__name__


def unlike(outcomes: Sequence[Outcome], references: Mapping[str, list[int]]) -> list[Outcome]:
    """Those that were answered with other tokens than the reference for their prompt."""
    return [of for of in outcomes if not of.error and of.token_ids != references[of.prompt]]
