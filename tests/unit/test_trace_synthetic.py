"""Made-up loads: deterministic, of the promised skew, and moving as their kind says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from expertmesh.errors import ConfigError
from expertmesh.trace.format import TraceDecoder
from expertmesh.trace.synthetic import KINDS, NUM_TOPICS, SWING, SyntheticOptions, generate, inclusion, write_trace

SMALL = {"layers": 3, "experts": 32, "top_k": 4, "windows": 20, "window_s": 10.0, "tokens_per_s": 50_000.0}


def options(kind: str, **changes: object) -> SyntheticOptions:
    return SyntheticOptions(kind=kind, **(SMALL | changes))


def loads(kind: str, **changes: object) -> np.ndarray:
    """[windows, L, E]"""
    return np.stack(list(generate(options(kind, **changes))))


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_traces_and_others_do_not(kind: str) -> None:
    assert b"".join(write_trace(options(kind))) == b"".join(write_trace(options(kind)))
    assert b"".join(write_trace(options(kind))) != b"".join(write_trace(options(kind, seed=1)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_holds_the_loads_that_were_generated_and_says_how(kind: str) -> None:
    decoder = TraceDecoder("x")
    records = list(decoder.feed(b"".join(write_trace(options(kind)))))
    rows = np.stack([r.rows_E for r in records]).reshape(20, 3, 32)
    np.testing.assert_array_equal(rows, loads(kind))
    assert [r.time_s for r in records] == [10.0 * window for window in range(20) for _ in range(3)]
    assert decoder.header.origin["synthetic"]["kind"] == kind
    assert decoder.header.origin["synthetic"]["seed"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_chooses_top_k_experts_on_average_and_none_twice(kind: str) -> None:
    rows = loads(kind, skew=1.5)
    tokens = 10.0 * 50_000.0
    swing = 1 + SWING if kind == "diurnal" else 1
    assert rows.max() <= tokens * swing
    assert rows.sum(2) == pytest.approx(tokens * 4, rel=0.01 if kind != "diurnal" else 1)


@pytest.mark.parametrize("skew", [0.0, 0.5, 0.8])
def test_popularity_follows_the_zipf_law(skew: float) -> None:
    ranked = -np.sort(-loads("zipf", skew=skew).mean(0), axis=1)
    law = np.arange(1, 33) ** -skew
    assert ranked == pytest.approx(np.tile(law / law.sum() * 4 * 500_000, (3, 1)), rel=0.02)


@pytest.mark.parametrize(("skew", "top_k"), [(1.0, 8), (2.0, 6), (10.0, 31), (0.0, 32), (3.0, 32)])
def test_inclusion_is_a_probability_that_sums_to_top_k_in_order_of_popularity(skew: float, top_k: int) -> None:
    popularity_LE = np.arange(1, 33.0)[None] ** -skew
    chosen_E = inclusion(popularity_LE, top_k)[0]
    assert chosen_E.sum() == pytest.approx(top_k)
    assert (chosen_E >= 0).all()
    assert (chosen_E <= 1).all()
    assert (np.diff(chosen_E) <= 1e-12).all()


def test_each_layer_has_its_own_popular_experts() -> None:
    hottest = loads("zipf", layers=20, skew=1.0)[0].argmax(1)
    assert len(set(hottest.tolist())) > 5


def test_zipf_stands_still() -> None:
    rows = loads("zipf")
    assert similarity(rows[0], rows[-1]) > 0.999


def test_drift_forgets_its_ranks_at_its_pace_and_keeps_its_law() -> None:
    rows = loads("drift", layers=30, windows=40, pace_s=100.0)
    assert similarity(rows[0], rows[1]) > 0.5
    assert similarity(rows[0], rows[1]) > similarity(rows[0], rows[4]) > similarity(rows[0], rows[12])
    assert abs(similarity(rows[0], rows[39])) < 0.1
    law = np.sort(rows, axis=2)
    assert law[0] == pytest.approx(law[39], rel=0.05)


def test_bursts_come_and_go_on_a_few_experts() -> None:
    rows = loads("bursts", layers=30, windows=60, skew=0.0, pace_s=50.0)
    calm = np.median(rows, axis=2, keepdims=True)
    bursting = rows > 3 * calm
    assert 1 < bursting.sum(2).mean() < 3
    starts = (bursting[1:] & ~bursting[:-1]).sum()
    assert bursting.sum() * 10.0 / starts == pytest.approx(50, rel=0.35)  # seconds of a burst


def test_diurnal_swings_back_to_where_it_was_after_its_period() -> None:
    rows = loads("diurnal", windows=41, pace_s=200.0)
    day, night, again = rows[5], rows[15], rows[25]
    assert similarity(day, again) > 0.99 > similarity(day, night)
    assert day.sum() / night.sum() == pytest.approx((1 + SWING) / (1 - SWING), rel=0.01)


def test_topics_change_at_once_and_return() -> None:
    rows = loads("topics", windows=400, pace_s=50.0, layers=1)
    jumps = [similarity(a, b) < 0.9 for a, b in itertools.pairwise(rows)]
    assert sum(jumps) == pytest.approx(400 * (1 - np.exp(-10 / 50)), rel=0.3)
    assert len({tuple(np.argsort(-window[0])[:3].tolist()) for window in rows}) == NUM_TOPICS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": 0}, "windows: 0"),
        ({"layers": 0}, "layers: 0"),
        ({"experts": -1}, "experts: -1"),
        ({"top_k": 33}, "top_k: 33"),
        ({"window_s": 0.0}, "window_s: 0"),
        ({"tokens_per_s": float("nan")}, "tokens_per_s: nan"),
        ({"tokens_per_s": 1e300}, "tokens_per_s"),
        ({"pace_s": -5.0}, r"pace_s: -5\.0"),
        ({"skew": 1e9}, "skew"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options("zipf", **changes)


def test_an_unknown_kind_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="'weather' is none of zipf, drift, bursts, diurnal, topics"):
        options("weather")
