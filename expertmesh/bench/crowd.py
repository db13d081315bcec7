"""Clients of a mesh that stream completions over HTTP, as users would, in a thread of their own, while a bench goes on.

Every answer is kept with the time of each token, so that pauses can be found and texts compared. Greedy decoding:
a prompt has one right answer.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import httpx

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(slots=True)
class Answer:
    """One streamed completion. Times are of `time.perf_counter`."""

    prompt: str
    started_s: float
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    """When each token came; those of one message came together."""
    error: str | None = None

    @property
    def gaps_s(self) -> list[tuple[float, float]]:
        """For each token but the first, when it came and how long after the one before."""
        return [(now, now - before) for before, now in itertools.pairwise(self.times_s)]


class Crowd:
    """`clients` that each send one request after the other, from entering the context until leaving it.

    With `period_s`, a client begins a request only every so many seconds: an offered load that does not depend on how
    fast the mesh answers, as long as it keeps up.
    """

    def __init__(
        self, url: str, prompts: Sequence[str], *, clients: int, tokens: int, period_s: float | None = None
    ) -> None:
        self.prompts = list(prompts)
        """What is asked for from the next request on; may be changed at any time."""
        self.answers: list[Answer] = []
        """Those that are complete, errors included."""
        self._url = url
        self._clients = clients
        self._tokens = tokens
        self._period_s = period_s
        self._thread = threading.Thread(target=lambda: asyncio.run(self._ask_all()), name="crowd")
        self._leaving = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """No new requests; those under way are finished."""
        self._leaving.set()
        self._thread.join()

    async def _ask_all(self) -> None:
        limits = httpx.Limits(max_connections=self._clients)
        async with httpx.AsyncClient(base_url=self._url, timeout=120, limits=limits) as http:
            await asyncio.gather(*(self._ask_on(http, number) for number in range(self._clients)))

    async def _ask_on(self, http: httpx.AsyncClient, number: int) -> None:
        due_s = time.perf_counter() + (self._period_s or 0.0) * number / self._clients
        for turn in itertools.count():
            if self._period_s is not None:
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                due_s += self._period_s
            if self._leaving.is_set():
                return
            prompts = self.prompts
            self.answers.append(await ask(http, prompts[(number + turn) % len(prompts)], self._tokens))


async def ask(http: httpx.AsyncClient, prompt: str, tokens: int) -> Answer:
    """One greedy completion."""
    answer = Answer(prompt, time.perf_counter())
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "return_token_ids": True}
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer.error = f"{response.status_code}: {(await response.aread()).decode()[:200]}"
                return answer
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    answer.error = str(chunk["error"])
                    return answer
                ids = [i for choice in chunk["choices"] for i in choice.get("token_ids") or ()]
                answer.token_ids += ids
                answer.times_s += [time.perf_counter()] * len(ids)
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
        return answer
    if len(answer.token_ids) != tokens:
        answer.error = f"{len(answer.token_ids)} tokens came instead of {tokens}"
    return answer


def undisturbed(url: str, prompts: Sequence[str], tokens: int) -> dict[str, list[int]]:
    """The right answer to each prompt, asked for one by one."""

    async def ask_each() -> dict[str, list[int]]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            answers = [await ask(http, prompt, tokens) for prompt in prompts]
        assert all(answer.error is None for answer in answers), answers
        return {answer.prompt: answer.token_ids for answer in answers}

    return asyncio.run(ask_each())


def verdict(answers: Sequence[Answer], right: dict[str, list[int]]) -> dict[str, object]:
    """How many failed, and how many said something else than they should."""
    failed = [answer.error for answer in answers if answer.error is not None]
    wrong = sum(answer.error is None and answer.token_ids != right[answer.prompt] for answer in answers)
    return {"requests": len(answers), "failed": len(failed), "first_failures": failed[:3], "wrong_answers": wrong}
