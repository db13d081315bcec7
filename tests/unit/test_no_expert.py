"""A choice that leads nowhere: no row travels for it, and it adds nothing."""

from __future__ import annotations

import torch

from expertmesh.gates.choices import NO_EXPERT
from expertmesh.ids import ExpertId
from expertmesh.kernels.spec import ExpertSpec
from expertmesh.moe.exchange import Exchange
from expertmesh.moe.layer import MoeLayer
from expertmesh.placement import HostInfo
from expertmesh.testing.experts import SILU, Mixture
from expertmesh.transport import LayerRequest
from expertmesh.transport.local import LocalTransport

MIXTURE = Mixture(ExpertSpec(hidden=16, intermediate=8, activation=SILU), 1, 4)
PLACEMENT = MIXTURE.placement({"a": [ExpertId(0, e) for e in range(2)], "b": [ExpertId(0, e) for e in range(2, 4)]})
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
FULL = torch.tensor([[0, 2], [3, 1], [2, 0], [1, 3]])
SPARSE = torch.tensor([[0, NO_EXPERT], [3, 1], [NO_EXPERT, NO_EXPERT], [NO_EXPERT, 3]])


class Counting(LocalTransport):
    """Notes the rows and pairs of every message."""

    def __init__(self) -> None:
        super().__init__(MIXTURE.hosts(PLACEMENT))
        self.sent: list[tuple[int, int]] = []

    def send(self, host: HostInfo, request: LayerRequest) -> int:
        self.sent.append((len(request.rows), sum(request.counts)))
        return super().send(host, request)


def test_only_rows_that_an_expert_wants_travel_and_their_results_are_the_same() -> None:
    transport = Counting()
    exchange = Exchange(transport, PLACEMENT)
    full = exchange.run(0, X, FULL)
    transport.sent.clear()
    sparse = exchange.run(0, X, SPARSE)
    assert sorted(transport.sent) == [(2, 2), (2, 2)]  # rows 0 and 1 to a; 1 and 3 to b
    is_expert = SPARSE != NO_EXPERT
    assert torch.equal(sparse[is_expert], full[is_expert])
    assert not sparse[~is_expert].any()


def test_tokens_without_any_expert_send_nothing_and_get_zeros() -> None:
    transport = Counting()
    nobody = torch.full((4, 2), NO_EXPERT)
    assert torch.equal(MoeLayer(Exchange(transport, PLACEMENT), 0)(X, nobody, torch.zeros(4, 2)), torch.zeros(4, 16))
    assert transport.sent == []
