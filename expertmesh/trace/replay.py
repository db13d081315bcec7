"""Sending a trace's routing through a live mesh: real hosts, real transport, made-up activations.

A trace of choices is replayed as it was, token by token. Of a trace of rows, each window of a layer becomes one
exchange, whose tokens choose their experts by the window's rows. Exchanges are sent one after the other, each no
earlier than its time. Knows neither the model nor the gateway. Its invariant: every record is sent or counted as
failed, and a failure ends nothing.

Shapes: T tokens, K experts per token, E experts of the layer, H hidden.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from expertmesh.errors import ConfigError, ExpertMeshError, TraceError
from expertmesh.kernels.spec import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from expertmesh.clock import Clock
    from expertmesh.ids import HostId
    from expertmesh.moe.exchange import Exchange
    from expertmesh.placement import HostInfo
    from expertmesh.trace.format import Record
    from expertmesh.transport import Answer, LayerRequest, Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """What is sent and when. Raises ConfigError for what cannot be."""

    hidden: int
    dtype: str
    top_k: int
    speed: float = 1.0
    """How many of the trace's seconds pass in one; infinity sends without waiting."""
    window_tokens: int = 128
    """Tokens of the exchange that stands for one window, in a trace of rows."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        for name in ("hidden", "top_k", "speed", "window_tokens"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: {getattr(self, name)} is not above 0")


class CountingTransport:
    """A transport that counts the rows it sends to each host."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.rows: Counter[HostId] = Counter()

    def send(self, host: HostInfo, request: LayerRequest) -> int:
        self.rows[host.id] += len(request.pair_rows)
        return self._transport.send(host, request)

    def receive(self, timeout_s: float) -> list[Answer]:
        return self._transport.receive(timeout_s)

    def forget(self, ticket: int) -> None:
        self._transport.forget(ticket)

    def wake(self) -> None:
        self._transport.wake()

    def close(self) -> None:
        self._transport.close()


def replay(
    records: Iterable[Record],
    exchange: Exchange,
    options: ReplayOptions,
    clock: Clock,
    wait: Callable[[float], object],
    report: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Send all records: plain JSON values. Raises TraceError when there are none.

    `wait` lets so many seconds pass; `report` is called after every exchange.
    """
    rng = np.random.default_rng(options.seed)
    latency_s: list[float] = []
    failures: Counter[str] = Counter()
    first_failure: str | None = None
    tokens, latest_s = 0, 0.0
    started_s = clock.monotonic()
    for record in records:
        index_TK = record.index_TK
        if index_TK is None:
            if not record.rows_E.any():
                continue
            index_TK = draw_choices(record.rows_E, options.window_tokens, options.top_k, rng)
        x_TH = torch.from_numpy(rng.standard_normal((len(index_TK), options.hidden), dtype=np.float32))
        early_s = started_s + record.time_s / options.speed - clock.monotonic()
        if early_s > 0:
            wait(early_s)
        latest_s = max(latest_s, -early_s)
        before_s = clock.monotonic()
        try:
            exchange.run(record.layer, x_TH.to(getattr(torch, options.dtype)), torch.from_numpy(index_TK))
        except ExpertMeshError as error:
            failures[type(error).__name__] += 1
            first_failure = first_failure or str(error)
        else:
            latency_s.append(clock.monotonic() - before_s)
            tokens += len(index_TK)
        report()
    if not latency_s and not failures:
        raise TraceError("the trace holds no exchanges: there is nothing to replay")
    quantiles = np.quantile(latency_s, (0.5, 0.99, 1.0)).tolist() if latency_s else (None,) * 3
    return {
        "exchanges": len(latency_s),
        "tokens": tokens,
        "failures": dict(failures),
        "first_failure": first_failure,
        "latency_s": dict(zip(("p50", "p99", "max"), quantiles, strict=True)),
        "latest_s": latest_s,
        "wall_s": clock.monotonic() - started_s,
    }


def draw_choices(rows_E: NDArray[np.int64], num_tokens: int, top_k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """index_TK: each token draws experts one after the other in proportion to `rows_E`, none twice.

    By the exponential race: the k earliest of arrivals at these rates are such a draw. Experts without rows come last.
    """
    with np.errstate(divide="ignore"):
        arrival_TE = rng.exponential(size=(num_tokens, len(rows_E))) / rows_E
    return np.argpartition(arrival_TE, top_k - 1, axis=1)[:, :top_k].astype(np.int64)
