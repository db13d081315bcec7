"""The answer does not change: bit for bit, for any number of hosts, placement, replica choice and batching."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.gates.choices import NO_EXPERT
from expertmesh.ids import ExpertId, HostId
from expertmesh.kernels.spec import ExpertSpec
from expertmesh.moe.exchange import Exchange
from expertmesh.moe.layer import MoeLayer
from expertmesh.testing.experts import SILU, Mixture
from expertmesh.transport.local import LocalTransport

NUM_EXPERTS, NUM_CHOICES, NUM_TOKENS, LAYER = 6, 3, 24, 1


@functools.cache
def mixture(dtype: str) -> Mixture:
    return Mixture(ExpertSpec(hidden=40, intermediate=37, activation=SILU, dtype=dtype), 2, NUM_EXPERTS)


@functools.cache
def batch(dtype: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(NUM_TOKENS, 40, generator=generator).to(getattr(torch, dtype))
    scores = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator)
    weights, index = scores.topk(NUM_CHOICES)
    return x, index, weights


def run(dtype: str, held: dict[str, list[ExpertId]], cuts: list[int]) -> torch.Tensor:
    """The layer's output for the batch, cut into the given pieces, on hosts that hold these experts."""
    placement = mixture(dtype).placement(held)
    exchange = Exchange(LocalTransport(mixture(dtype).hosts(placement)), placement)
    try:
        layer = MoeLayer(exchange, LAYER)
        edges = [0, *sorted(cuts), NUM_TOKENS]
        pieces = [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]
        return torch.cat([layer(*(part[piece] for part in batch(dtype))) for piece in pieces])
    finally:
        exchange.close()


@functools.cache
def undisturbed(dtype: str) -> torch.Tensor:
    return run(dtype, {"only": [ExpertId(LAYER, e) for e in range(NUM_EXPERTS)]}, cuts=[])


@st.composite
def holdings(draw: st.DrawFn) -> dict[str, list[ExpertId]]:
    """Who holds what on 1, 2 or 4 hosts, in any order; every expert somewhere."""
    names = [f"h{i}" for i in range(draw(st.sampled_from([1, 2, 4])))]
    held: dict[str, list[ExpertId]] = {name: [] for name in names}
    for index in range(NUM_EXPERTS):
        for name in draw(st.lists(st.sampled_from(names), min_size=1, unique=True)):
            held[name].append(ExpertId(LAYER, index))
    return held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(held=holdings(), cuts=st.lists(st.integers(1, NUM_TOKENS - 1), max_size=6, unique=True))
@settings(max_examples=40, deadline=None)
def test_output_is_the_same_bit_for_bit(dtype: str, held, cuts) -> None:
    assert torch.equal(run(dtype, held, cuts), undisturbed(dtype))


@given(
    held=holdings(),
    nowhere=st.sets(st.integers(0, NUM_TOKENS * NUM_CHOICES - 1)),
    dead=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_pairs_of_no_expert_cost_nothing_and_change_nothing(held, nowhere: set[int], dead: bool) -> None:
    """The same rows as without them, zero in their places, no word of them to a host; also when one is gone."""
    x, index, _ = batch("float32")
    flat = index.clone().reshape(-1)
    flat[sorted(nowhere)] = NO_EXPERT
    everywhere = [ExpertId(LAYER, e) for e in range(NUM_EXPERTS)]
    placement = mixture("float32").placement(held | {"all": everywhere})
    hosts = mixture("float32").hosts(placement)
    if dead:
        del hosts[HostId("h0")]  # its pairs are sent again, to the one that has all
    asked = _Asked(hosts)
    exchange = Exchange(asked, placement)
    rows = exchange.run(LAYER, x, flat.reshape(index.shape)).flatten(0, 1)
    # Without them: every pair that is left as a token with one choice.
    left = (flat >= 0).nonzero()[:, 0]
    expected = exchange.run(LAYER, x[left // NUM_CHOICES], flat[left, None])[:, 0]
    exchange.close()
    assert torch.equal(rows[left], expected)
    assert not rows[sorted(nowhere)].any()
    assert asked.pairs == 2 * len(left)


class _Asked(LocalTransport):
    """Counts the pairs that hosts which are there are asked for."""

    def __init__(self, hosts) -> None:
        super().__init__(hosts)
        self._there = hosts
        self.pairs = 0

    def send(self, host, request) -> int:
        if host.id in self._there:
            assert min(request.counts) > 0
            assert min(request.experts) >= 0
            self.pairs += sum(request.counts)
        return super().send(host, request)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_output_is_the_dense_layers(dtype: str, tolerance: float) -> None:
    expected = mixture(dtype).dense(LAYER, *batch(dtype))
    torch.testing.assert_close(undisturbed(dtype), expected, rtol=tolerance, atol=tolerance)
    assert expected.abs().max() > 0.1


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_requests_of_several_routers_that_share_a_launch_do_not_touch_each_other(data: st.DataObject) -> None:
    """What the batcher joins: works of any layers and rows, computed together or one by one."""
    from expertmesh.transport import LayerRequest

    shared = mixture("float32")
    host = shared.host([ExpertId(layer, e) for layer in range(2) for e in range(NUM_EXPERTS)])
    works = []
    for number in range(data.draw(st.integers(2, 4))):
        generator = torch.Generator().manual_seed(number)
        num_rows = data.draw(st.integers(1, 9))
        x = torch.randn(num_rows, 40, generator=generator)
        experts = data.draw(st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, unique=True))
        counts = [data.draw(st.integers(1, num_rows)) for _ in experts]
        pair_rows = torch.randint(num_rows, (sum(counts),), generator=generator).int().numpy()
        rows = x.view(torch.uint8).numpy()
        layer = data.draw(st.integers(0, 1))
        works.append(host.prepare(LayerRequest(layer, "float32", rows, pair_rows, experts, counts)))
    together = host.compute(works)
    alone = [host.compute([work])[0] for work in works]
    assert [reply.rows.tobytes() for reply in together] == [reply.rows.tobytes() for reply in alone]
