"""What a placement is worth under a load, as the views tell it."""

from __future__ import annotations

import json

import pytest

from expertmesh.control import views
from expertmesh.control.views import imbalance, load
from expertmesh.hosts.configuration import HostConfiguration
from expertmesh.ids import ExpertId, HostId
from expertmesh.kernels.spec import Activation, ExpertSpec
from expertmesh.placement import HostInfo, Placement

A, B = HostId("a"), HostId("b")


def placement(*layers: tuple[str, ...]) -> Placement:
    """One layer per argument, which names each expert's holders, such as ("a", "ab")."""
    return Placement(
        epoch=1,
        hosts=tuple(HostInfo(id=host, address="-") for host in (A, B)),
        num_experts=tuple(map(len, layers)),
        replicas={
            ExpertId(layer, index): tuple(map(HostId, holders))
            for layer, experts in enumerate(layers)
            for index, holders in enumerate(experts)
        },
    )


@pytest.mark.parametrize(
    ("holders", "loads", "rates", "expected"),
    [
        (("a", "b"), [5, 5], (1, 1), 1.0),
        (("a", "b"), [9, 1], (1, 1), 1.8),  # 9 of 10 on one of two
        (("ab", "b"), [9, 1], (1, 1), 1.0),  # a replica of the hot expert levels it
        (("a", "b"), [9, 3], (3, 1), 1.0),  # unlike hosts, loaded as they are fast
        (("a", "a"), [1, 1], (1, 1), 2.0),  # a host that holds nothing yet counts all the same
        (("ab", "ab"), [1, 0], (1, 3), 1.0),
    ],
)
def test_imbalance_is_the_slowest_hosts_time_over_the_ideal(holders, loads, rates, expected):
    found = imbalance(placement(holders), [loads], dict(zip((A, B), rates, strict=True)))
    assert found == [pytest.approx(expected)]


def test_a_host_that_has_gone_takes_its_replicas_along():
    assert imbalance(placement(("ab", "ab")), [[1, 1]], {A: 1.0}) == [1.0]
    assert imbalance(placement(("a", "b")), [[0, 1]], {A: 1.0}) == [None]


def test_the_mean_is_over_the_layers_that_have_load():
    placed = placement(("a", "b"), ("a", "b"), ("a", "b"))
    shown = load(placed, [[1, 1], [1, 0], [0, 0]], {A: 1.0, B: 1.0})
    assert shown["imbalance_of_layers"] == [1.0, 2.0, None]
    assert shown["imbalance"] == 1.5
    assert load(placed, [[0, 0]] * 3, {A: 1.0, B: 1.0})["imbalance"] is None
    assert load(None, [[1, 0]], {A: 1.0})["imbalance"] is None


def test_a_placement_is_told_with_the_rows_that_experts_take():
    spec = ExpertSpec(hidden=96, intermediate=32, activation=Activation(name="silu"), dtype="bfloat16")
    served = HostConfiguration(checkpoint="tiny", specs=(spec,), layer_specs=(0, 0), layer_experts=(2, 1))
    placed = placement(("a", "ab"), ("b",))
    told = json.loads(json.dumps(views.placement(placed, served)))
    assert (told["hidden"], told["dtype"]) == (96, "bfloat16")
    assert Placement.from_json(told) == placed
