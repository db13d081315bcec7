"""A gate's config: what works is made, and what cannot work gets one clear line."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from expertmesh.errors import ConfigError
from expertmesh.gates.route import GateInput, route
from expertmesh.gates.spec import GateSpec, Groups
from expertmesh.gates.strategies import STRATEGIES

BAD = [
    ({"strategy": "softmax-topkk", "k": 2}, r"gate\.strategy 'softmax-topkk' is unknown: did you mean softmax-topk\?"),
    ({"strategy": "Switch"}, r"did you mean switch\? There are softmax-topk, .*dense"),
    ({"strategy": "topp", "top_p": 0.5}, r"did you mean top-p\?"),
    ({"strategy": "a\nb"}, r"gate\.strategy 'a b' is unknown"),
    ({"strategy": "softmax-topk"}, r"gate\.k is missing: the strategy softmax-topk needs it"),
    ({"strategy": "softmax-topk", "k": 9}, r"gate\.k is 9, but the layer has 8 experts: use at most as many"),
    ({"strategy": "top-p", "top_p": 0.5, "k": 9}, r"gate\.k is 9, but the layer has 8"),
    ({"strategy": "softmax-topk", "k": 0}, r"gate\.k is 0: use at least 1"),
    ({"strategy": "gshard", "num_experts": 1}, r"gshard takes 2 for each token, but the layer has 1 experts"),
    ({"strategy": "dense", "num_experts": 0}, r"gate\.num_experts is 0: use at least 1"),
    ({"strategy": "top-p"}, r"gate\.top_p is missing"),
    ({"strategy": "top-p", "top_p": 0.0}, r"gate\.top_p is 0: use a probability above 0 and at most 1"),
    ({"strategy": "top-p", "top_p": 1.01}, r"gate\.top_p is 1\.01"),
    ({"strategy": "top-p", "top_p": float("nan")}, r"gate\.top_p is nan"),
    ({"strategy": "threshold", "k": 2}, r"gate\.ratio is missing: the strategy threshold needs it"),
    ({"strategy": "threshold", "k": 2, "ratio": 1.5}, r"gate\.ratio is 1\.5: use a number above 0 and at most 1"),
    ({"strategy": "threshold", "k": 9, "ratio": 0.5}, r"gate\.k is 9, but the layer has 8"),
    (
        {"strategy": "dense", "top_p": 0.5},
        r"gate\.top_p has no meaning for the strategy dense: remove it, or use top-p",
    ),
    ({"strategy": "topk-softmax", "k": 2, "normalize": True}, r"gate\.normalize has no meaning"),
    ({"strategy": "switch", "k": 2}, r"gate\.k has no meaning for the strategy switch"),
    (
        {"strategy": "switch", "capacity_factor": 0.0},
        r"capacity_factor 0 gives a capacity below one token: use a number",
    ),
    ({"strategy": "gshard", "capacity_factor": -1.0}, r"capacity_factor -1 gives a capacity below one"),
    ({"strategy": "switch", "capacity_factor": float("inf")}, r"gate\.capacity_factor inf"),
    ({"strategy": "expert-choice"}, r"gate\.capacity_factor is missing"),
    (
        {"strategy": "switch", "overflow": "next_best"},
        r"gate\.overflow 'next_best' is unknown: did you mean next-best\?",
    ),
    ({"strategy": "softmax-topk", "k": 1, "scale": 0.0}, r"gate\.scale is 0: use a number above 0"),
    ({"strategy": "softmax-topk", "k": 2, "group_score": "sum"}, r"gate\.group_score 'sum' is unknown"),
    (
        {"strategy": "softmax-topk", "k": 2, "num_groups": 3},
        r"num_groups 3 does not divide the layer's 8 experts: use 2",
    ),
    ({"strategy": "softmax-topk", "k": 2, "num_groups": 0}, r"gate\.num_groups is 0: use at least 1"),
    ({"strategy": "softmax-topk", "k": 2, "num_groups": 2, "groups_kept": 3}, r"groups_kept is 3 of 2 groups"),
    (
        {"strategy": "sigmoid-topk", "k": 3, "num_groups": 4},
        r"gate\.k is 3, but gate\.groups_kept 1 leaves 2 experts to choose from: keep 2 groups or more",
    ),
    (
        {"strategy": "sigmoid-topk", "k": 1, "num_groups": 8, "groups_kept": 2, "group_score": "top2"},
        r"gate\.group_score is top2, but a group has one expert",
    ),
]


@pytest.mark.parametrize(("fields", "line"), BAD)
def test_a_gate_that_cannot_work_gets_one_clear_line(fields, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as error:
        GateSpec(**{"num_experts": 8, **fields})
    assert "\n" not in str(error.value)


def given(num_experts: int = 8, **more) -> GateInput:
    return GateInput(logits_TE=torch.zeros(4, num_experts), **more)


def test_a_gate_and_a_layer_that_do_not_fit_are_refused() -> None:
    top2 = GateSpec(strategy="softmax-topk", num_experts=8, k=2)
    with pytest.raises(ConfigError, match=r"gate\.num_experts is 8, but the layer has 16: use 16"):
        route(top2, given(16))
    with pytest.raises(ConfigError, match=r"gate\.strategy noisy-topk needs noise_TE, which this layer does not have"):
        route(GateSpec(strategy="noisy-topk", num_experts=8, k=2), given())
    hashed = GateSpec(strategy="hash", num_experts=8, k=2)
    with pytest.raises(ConfigError, match="needs token_T"):
        route(hashed, given())
    table = torch.zeros(5, 1, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"gate\.k is 2, but the hash table has 1 experts for each id"):
        route(hashed, given(token_T=torch.zeros(4, dtype=torch.int64), table_VK=table))
    once = GateSpec(strategy="hash", num_experts=8, k=1)
    with pytest.raises(ConfigError, match="5 token ids and cannot place id 7: make it for the model's vocab_size"):
        route(once, given(token_T=torch.tensor([0, 1, 7, 2]), table_VK=table))
    with pytest.raises(ConfigError, match="takes no selection bias"):
        route(GateSpec(strategy="dense", num_experts=8), given(bias_E=torch.zeros(8)))
    with pytest.raises(ConfigError, match=r"gate\.random_second draws"):
        route(GateSpec(strategy="gshard", num_experts=8, random_second=True), given())
    with pytest.raises(ConfigError, match="expert 0 is chosen by 4 tokens where its capacity is 1"):
        route(GateSpec(strategy="switch", num_experts=8, capacity_factor=1.0, overflow="error"), given())


def test_capacity_counts_the_choices_that_the_strategy_makes() -> None:
    assert GateSpec(strategy="switch", num_experts=8).capacity(64) is None
    assert GateSpec(strategy="switch", num_experts=8, capacity_factor=1.25).capacity(64) == 10
    assert GateSpec(strategy="gshard", num_experts=8, capacity_factor=1.25).capacity(64) == 20
    assert GateSpec(strategy="expert-choice", num_experts=8, capacity_factor=2).capacity(64) == 16
    assert GateSpec(strategy="switch", num_experts=8, capacity_factor=1.0).capacity(1) == 1


def test_groups_that_are_all_kept_are_no_limit() -> None:
    fields = {"strategy": "sigmoid-topk", "num_experts": 8, "k": 2}
    assert GateSpec(**fields).groups is None
    assert GateSpec(**fields, num_groups=4, groups_kept=4).groups is None
    kept = GateSpec(**fields, num_groups=4, groups_kept=2, group_score="top2")
    assert kept.groups == Groups(num=4, kept=2, score="top2")


def test_a_spec_says_whether_a_tokens_experts_depend_on_others() -> None:
    assert GateSpec(strategy="top-p", num_experts=8, top_p=0.5).is_alone
    assert GateSpec(strategy="switch", num_experts=8).is_alone
    assert not GateSpec(strategy="switch", num_experts=8, capacity_factor=1.0).is_alone
    assert not GateSpec(strategy="expert-choice", num_experts=8, capacity_factor=1.0).is_alone
    assert not GateSpec(strategy="gshard", num_experts=8, random_second=True).is_alone


def test_every_strategy_says_what_it_is_for_and_what_it_costs() -> None:
    fields = set(GateSpec.__dataclass_fields__)
    for strategy in STRATEGIES.values():
        assert strategy.title
        assert strategy.paper
        assert strategy.purpose
        assert "row" in strategy.cost
        assert {*strategy.needs, *strategy.takes} <= fields
        assert set(strategy.inputs) <= set(GateInput.__dataclass_fields__)


def test_a_spec_is_made_where_there_is_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from expertmesh.gates.spec import GateSpec; print(GateSpec.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "GateSpec"
