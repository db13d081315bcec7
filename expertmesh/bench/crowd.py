"""Clients of a mesh that stream completions over HTTP, as users would, while a bench goes on.

Every answer is kept with the time of each token, so that pauses can be found and texts compared. Greedy decoding:
a prompt has one right answer.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import httpx

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from multiprocessing.connection import Connection


PATIENCE_S = 330.0
"""How long a client waits for the next token: longer than any mesh that we start lets it."""


@dataclass(slots=True)
class Answer:
    """One streamed completion. Times are of `time.perf_counter`."""

    prompt: str
    started_s: float
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    """When each token came; those of one message came together."""
    error: str | None = None
    status: int | None = None
    """HTTP's; None if there was none."""
    retry_after: str | None = None
    ended_s: float = 0.0

    @property
    def gaps_s(self) -> list[tuple[float, float]]:
        """For each token but the first, when it came and how long after the one before."""
        return [(now, now - before) for before, now in itertools.pairwise(self.times_s)]


class Crowd:
    """`clients` that each send one request after the other, from entering the context until leaving it.

    They run in a process of their own, for what else a bench does must not show in their times. With `period_s`, a
    client begins a request only every so many seconds: an offered load that does not depend on how fast the mesh
    answers, as long as it keeps up.
    """

    def __init__(
        self,
        url: str,
        prompts: Sequence[str],
        *,
        clients: int,
        tokens: int,
        period_s: float | None = None,
        model: str = "tiny",
    ) -> None:
        self.answers: list[Answer] = []
        """All of them, errors included, once the context is left."""
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        arguments = (theirs, _Asking(url, list(prompts), clients, tokens, period_s, model))
        self._process = context.Process(target=_run, args=arguments, name="crowd")

    def ask_for(self, prompts: Sequence[str]) -> None:
        """From the next request on."""
        self._orders.send(list(prompts))

    def __enter__(self) -> Self:
        self._process.start()
        self._orders.recv()  # it is ready
        return self

    def __exit__(self, *_: object) -> None:
        """No new requests; those under way are finished."""
        self._orders.send(None)
        self.answers = self._orders.recv()
        self._process.join()


@dataclass(slots=True)
class _Asking:
    """What a crowd does."""

    url: str
    prompts: list[str]
    clients: int
    tokens: int
    period_s: float | None
    model: str
    is_leaving: bool = False


def _run(orders: Connection, asking: _Asking) -> None:
    """The crowd's process: asks until it is told to leave, then sends all answers."""

    def obey() -> None:
        while (prompts := orders.recv()) is not None:
            asking.prompts = prompts
        asking.is_leaving = True

    threading.Thread(target=obey, daemon=True).start()
    orders.send("ready")
    orders.send(asyncio.run(_ask_all(asking)))


async def _ask_all(asking: _Asking) -> list[Answer]:
    answers: list[Answer] = []

    async def ask_on(number: int) -> None:
        due_s = time.perf_counter() + (asking.period_s or 0.0) * number / asking.clients
        for turn in itertools.count():
            if asking.period_s is not None:
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                due_s += asking.period_s
            if asking.is_leaving:
                return
            prompts = asking.prompts
            prompt = prompts[(number + turn) % len(prompts)]
            answers.append(await ask(http, prompt, asking.tokens, model=asking.model))

    limits = httpx.Limits(max_connections=asking.clients)
    async with httpx.AsyncClient(base_url=asking.url, timeout=PATIENCE_S, limits=limits) as http:
        await asyncio.gather(*(ask_on(number) for number in range(asking.clients)))
    return answers


async def ask(http: httpx.AsyncClient, prompt: str, tokens: int, *, model: str = "tiny") -> Answer:
    """One greedy completion."""
    answer = Answer(prompt, time.perf_counter())
    await _listen(http, answer, tokens, model)
    answer.ended_s = time.perf_counter()
    return answer


async def _listen(http: httpx.AsyncClient, answer: Answer, tokens: int, model: str) -> None:
    prompt = answer.prompt
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "return_token_ids": True}
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            answer.status, answer.retry_after = response.status_code, response.headers.get("retry-after")
            if response.status_code != 200:
                answer.error = f"{response.status_code}: {(await response.aread()).decode()[:200]}"
                return
            async for chunk in chunks(response):
                if "error" in chunk:
                    answer.error = str(chunk["error"])
                    return
                ids = token_ids(chunk)
                answer.token_ids += ids
                answer.times_s += [time.perf_counter()] * len(ids)
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
        return
    if len(answer.token_ids) != tokens:
        answer.error = f"{len(answer.token_ids)} tokens came instead of {tokens}"


async def chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """What a streamed completion says, piece by piece; an error too."""
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def token_ids(chunk: dict[str, Any]) -> list[int]:
    """The new tokens of a piece that is no error."""
    return [token_id for choice in chunk["choices"] for token_id in choice.get("token_ids") or ()]


def undisturbed(url: str, prompts: Sequence[str], tokens: int, *, model: str = "tiny") -> dict[str, list[int]]:
    """The right answer to each prompt, asked for one by one."""

    async def ask_each() -> dict[str, list[int]]:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as http:
            answers = [await ask(http, prompt, tokens, model=model) for prompt in prompts]
        assert all(answer.error is None for answer in answers), answers
        return {answer.prompt: answer.token_ids for answer in answers}

    return asyncio.run(ask_each())


def verdict(answers: Sequence[Answer], right: dict[str, list[int]]) -> dict[str, object]:
    """How many failed, and how many said something else than they should."""
    failed = [answer.error for answer in answers if answer.error is not None]
    wrong = sum(answer.error is None and answer.token_ids != right[answer.prompt] for answer in answers)
    return {"requests": len(answers), "failed": len(failed), "first_failures": failed[:3], "wrong_answers": wrong}
