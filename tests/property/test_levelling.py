"""Levelling is exact: it reaches the optimum of the linear program, and loses no row on the way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from expertmesh.levelling import Levels, pour


def least_time(rows, hosts, load, rate) -> float:
    """The linear program: variables are the parts, one for each expert and host of it, and the slowest time."""
    pairs = [(i, host) for i, of in enumerate(hosts) for host in of]
    num = len(pairs)
    objective = np.zeros(num + 1)
    objective[-1] = 1
    limits = np.zeros((len(rate), num + 1))
    sums = np.zeros((len(rows), num + 1))
    for column, (i, host) in enumerate(pairs):
        limits[host, column] = 1
        sums[i, column] = 1
    limits[:, -1] = -np.array(rate)
    solved = linprog(objective, A_ub=limits, b_ub=-np.array(load), A_eq=sums, b_eq=rows, method="highs")
    return solved.fun


@st.composite
def cases(draw):
    num_hosts = draw(st.integers(1, 7))
    amounts = st.one_of(st.just(0.0), st.floats(0.01, 100))
    rate = draw(st.lists(st.floats(0.1, 10), min_size=num_hosts, max_size=num_hosts))
    load = draw(st.lists(amounts, min_size=num_hosts, max_size=num_hosts))
    choices = st.lists(st.integers(0, num_hosts - 1), min_size=1, unique=True)
    hosts = draw(st.lists(choices, min_size=1, max_size=12))
    rows = draw(st.lists(amounts, min_size=len(hosts), max_size=len(hosts)))
    return rows, hosts, load, rate


@settings(max_examples=300, deadline=None)
@given(cases())
def test_the_slowest_time_is_that_of_the_linear_program(case) -> None:
    rows, hosts, load, rate = case
    levels = Levels(rows, hosts, list(load), rate)
    levels.settle()
    reached = max(x / r for x, r in zip(levels.load, rate, strict=True))
    assert reached == pytest.approx(least_time(rows, hosts, load, rate), rel=1e-6, abs=1e-9)


@settings(deadline=None)
@given(cases())
def test_every_row_is_on_a_host_of_its_expert_and_loads_add_up(case) -> None:
    rows, hosts, load, rate = case
    levels = Levels(rows, hosts, list(load), rate)
    levels.settle()
    expected = np.array(load)
    for amount, of, given_rows in zip(rows, hosts, levels.given, strict=True):
        assert set(given_rows) == set(of)
        assert min(given_rows.values()) >= -1e-9
        assert sum(given_rows.values()) == pytest.approx(amount, abs=1e-6)
        for host, part in given_rows.items():
            expected[host] += part
    assert levels.load == pytest.approx(expected, abs=1e-6)


@settings(deadline=None)
@given(cases(), st.floats(0.5, 1.5))
def test_what_stays_above_a_target_is_a_closed_set_that_no_split_relieves(case, factor) -> None:
    rows, hosts, load, rate = case
    target = factor * (sum(rows) + sum(load)) / sum(rate)
    levels = Levels(rows, hosts, list(load), rate)
    stuck = set(levels.relieve(target))
    best = least_time(rows, hosts, load, rate)
    assert bool(stuck) == (best > target * (1 + 1e-6)) or best == pytest.approx(target, rel=1e-6)
    for of, given_rows in zip(hosts, levels.given, strict=True):
        if any(given_rows[host] > 1e-6 for host in of if host in stuck):
            assert stuck.issuperset(of)
    assert all(
        x / r <= target * (1 + 1e-6) for h, (x, r) in enumerate(zip(levels.load, rate, strict=True)) if h not in stuck
    )


@settings(deadline=None)
@given(cases(), st.data())
def test_an_expert_given_other_hosts_later_is_levelled_as_if_from_the_start(case, data) -> None:
    rows, hosts, load, rate = case
    which = data.draw(st.integers(0, len(rows) - 1))
    other = data.draw(st.lists(st.integers(0, len(rate) - 1), min_size=1, unique=True))
    moved = Levels(rows, hosts, list(load), rate)
    moved.settle()
    twin = moved.copy()
    before = list(moved.load)
    twin.move(which, other)
    twin.settle()
    assert moved.load == before, "a copy shares nothing"
    fresh = Levels(rows, [*hosts[:which], other, *hosts[which + 1 :]], list(load), rate)
    fresh.settle()
    slowest = [max(x / r for x, r in zip(of.load, rate, strict=True)) for of in (twin, fresh)]
    assert slowest[0] == pytest.approx(slowest[1], rel=1e-6, abs=1e-9)


def test_pouring_fills_the_emptiest_first() -> None:
    load = [4.0, 0.0, 1.0]
    assert pour(5, [0, 1, 2], load, [1.0, 1.0, 1.0]) == {0: 0.0, 1: 3.0, 2: 2.0}
    assert load == [4.0, 3.0, 3.0]


def test_pouring_over_two_goes_by_rate() -> None:
    load = [0.0, 3.0]
    assert pour(9, [0, 1], load, [1.0, 3.0]) == {0: 3.0, 1: 6.0}
    assert load == [3.0, 9.0]
