"""What somebody who watches an exchange gets to see."""

from __future__ import annotations

import torch

from expertmesh.ids import ExpertId
from expertmesh.kernels.spec import ExpertSpec
from expertmesh.moe.exchange import Exchange
from expertmesh.testing.experts import SILU, Mixture
from expertmesh.transport.local import LocalTransport


def test_an_observer_sees_every_choice_and_changes_nothing() -> None:
    mixture = Mixture(ExpertSpec(hidden=16, intermediate=8, activation=SILU), 1, 4)
    placement = mixture.placement({"h": [ExpertId(0, e) for e in range(4)]})
    exchange = Exchange(LocalTransport(mixture.hosts(placement)), placement)
    x, index = torch.randn(3, 16), torch.tensor([[0, 2], [3, 1], [2, 0]])
    unseen = exchange.run(0, x, index)
    seen = []
    exchange.observe = lambda layer, index_TK: seen.append((layer, index_TK.tolist()))
    assert torch.equal(exchange.run(0, x, index), unseen)
    assert seen == [(0, index.tolist())]
