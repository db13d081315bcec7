"""The baseline is DeepSeek's algorithm: its published example, and what its description promises."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from expertmesh.bench import eplb

# The example of the algorithm's README: two layers of 12 experts, 16 replicas, 4 groups, 2 nodes of 4 devices.
README_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
README_HOSTS = [
    [[5, 6], [5, 7], [8, 4], [3, 4], [10, 9], [10, 2], [0, 1], [11, 1]],
    [[7, 10], [6, 8], [6, 11], [8, 9], [2, 4], [5, 1], [5, 0], [3, 1]],
]


@pytest.mark.parametrize("layer", [0, 1])
def test_it_places_the_published_example_as_published(layer) -> None:
    hosts = eplb.place(README_LOADS[layer], 8, 2, num_groups=4, num_nodes=2)
    assert sorted(sorted(of) for of in hosts) == sorted(sorted(of) for of in README_HOSTS[layer])


def test_each_further_replica_goes_to_the_expert_with_most_load_per_replica() -> None:
    assert eplb.replicate([12, 6, 5], 6) == [0, 1, 2, 0, 0, 1]


def test_packs_are_of_equal_size_and_the_heaviest_item_goes_first() -> None:
    packs = eplb.pack([9, 1, 1, 1, 1, 1], 2)
    assert [len(of) for of in packs] == [3, 3]
    assert packs[0][0] == 0


def test_groups_that_do_not_divide_nodes_are_placed_over_all_hosts_at_once() -> None:
    loads = README_LOADS[0]
    assert eplb.place(loads, 8, 2, num_groups=3, num_nodes=2) == eplb.place(loads, 8, 2)


@pytest.mark.parametrize(("experts", "hosts", "slots"), [(64, 8, 10), (256, 32, 9), (12, 4, 3), (5, 7, 1)])
def test_every_slot_is_used_and_every_expert_is_there(experts, hosts, slots) -> None:
    loads = np.random.default_rng(0).exponential(size=experts).tolist()
    placed = eplb.place(loads, hosts, slots)
    assert [len(of) for of in placed] == [slots] * hosts
    assert Counter(expert for of in placed for expert in of) == Counter(eplb.replicate(loads, hosts * slots))
