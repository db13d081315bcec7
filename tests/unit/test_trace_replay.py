"""Replaying: at its time, with the choices of the trace or ones drawn like them, failures counted. In this process."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from expertmesh.errors import ConfigError, TraceError
from expertmesh.ids import ExpertId
from expertmesh.kernels.spec import ExpertSpec
from expertmesh.moe.exchange import Exchange, ExchangeLimits
from expertmesh.testing.experts import SILU, Mixture
from expertmesh.trace.format import Record
from expertmesh.trace.replay import CountingTransport, ReplayOptions, draw_choices, replay
from expertmesh.transport.local import LocalTransport

MIXTURE = Mixture(ExpertSpec(hidden=8, intermediate=4, activation=SILU), 1, 4)
OPTIONS = ReplayOptions(hidden=8, dtype="float32", top_k=2)


class Waiting:
    """A clock that goes on only when one waits."""

    def __init__(self) -> None:
        self.now_s = 50.0
        self.waits: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def wall(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now_s += seconds


def chosen(time_s: float, *tokens: tuple[int, int]) -> Record:
    index_TK = np.array(tokens)
    return Record(time_s=time_s, layer=0, rows_E=np.bincount(index_TK.reshape(-1), minlength=4), index_TK=index_TK)


@pytest.fixture
def transport() -> CountingTransport:
    placement = MIXTURE.placement({"a": [ExpertId(0, 0)], "b": [ExpertId(0, e) for e in (1, 2, 3)]})
    return CountingTransport(LocalTransport(MIXTURE.hosts(placement)))


@pytest.fixture
def exchange(transport) -> Iterator[Exchange]:
    placement = MIXTURE.placement({"a": [ExpertId(0, 0)], "b": [ExpertId(0, e) for e in (1, 2, 3)]})
    exchange = Exchange(transport, placement, ExchangeLimits(timeout_s=5))
    yield exchange
    exchange.close()


def test_exchanges_are_sent_at_their_times_at_the_speed_asked_for(exchange) -> None:
    clock = Waiting()
    records = [chosen(0.0, (0, 1)), chosen(1.0, (0, 1)), chosen(3.0, (2, 3))]
    options = ReplayOptions(hidden=8, dtype="float32", top_k=2, speed=2)
    result = replay(records, exchange, options, clock, clock.wait)
    assert clock.waits == [0.5, 1.0]
    assert (result["exchanges"], result["tokens"], result["wall_s"], result["latest_s"]) == (3, 3, 1.5, 0.0)


def test_rows_are_counted_where_they_are_sent(exchange, transport) -> None:
    clock = Waiting()
    replay([chosen(0.0, (0, 1), (0, 2), (3, 0))], exchange, OPTIONS, clock, clock.wait)
    assert transport.rows == {"a": 3, "b": 3}


def test_a_failure_is_counted_and_ends_nothing(transport) -> None:
    nowhere = Exchange(transport, MIXTURE.placement({"a": [ExpertId(0, 0)]}), ExchangeLimits(timeout_s=0.01))
    clock = Waiting()
    result = replay([chosen(0, (1, 2)), chosen(0, (0, 0))], nowhere, OPTIONS, clock, clock.wait)
    assert (result["failures"], result["exchanges"]) == ({"DeadlineExceededError": 1}, 1)
    assert "layer 0" in result["first_failure"]


def test_nothing_to_send_is_an_error(exchange) -> None:
    clock = Waiting()
    empty = Record(time_s=0, layer=0, rows_E=np.zeros(4, dtype=np.int64), index_TK=None)
    with pytest.raises(TraceError, match="holds no exchanges"):
        replay([empty], exchange, OPTIONS, clock, clock.wait)


def test_tokens_draw_their_experts_without_repetition_in_proportion_to_rows() -> None:
    rows_E = np.array([600, 300, 100, 0])
    drawn = draw_choices(rows_E, 40_000, 2, np.random.default_rng(0))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    share = rows_E / rows_E.sum()
    # First or second: after another was first, an expert is second in proportion among those left.
    expected = [p + sum(q * p / (1 - q) for j, q in enumerate(share) if j != i) for i, p in enumerate(share)]
    assert np.bincount(drawn.reshape(-1), minlength=4) / 40_000 == pytest.approx(expected, abs=0.01)


def test_experts_without_rows_are_drawn_only_when_no_others_are_left() -> None:
    assert set(draw_choices(np.array([0, 5, 0, 0]), 100, 2, np.random.default_rng(0))[:, :].reshape(-1)) > {1}
    assert (draw_choices(np.array([0, 5, 7, 0]), 100, 2, np.random.default_rng(0)).sum(1) == 3).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "'int8' is not one of"),
        ({"hidden": 0}, "hidden: 0"),
        ({"speed": -1.0}, "speed: -1.0"),
        ({"speed": float("nan")}, "speed: nan"),
        ({"window_tokens": 0}, "window_tokens: 0"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReplayOptions(**({"hidden": 8, "dtype": "float32", "top_k": 2} | changes))
