"""Gates and balancing losses choose and cost what transformers' own modules do.

Every gate module gets the identity as its projection, so that hidden states are the logits. Choices are compared as
matrices of weights: some modules leave the order of experts open.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.dbrx.modeling_dbrx import DbrxFFN
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter, DeepseekV4TopKRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.jetmoe.modeling_jetmoe import JetMoeTopKGating
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.switch_transformers import modeling_switch_transformers as switch_transformers

from expertmesh.gates.balancing import switch_loss, z_loss
from expertmesh.gates.capacity import gshard, switch
from expertmesh.gates.choices import best_k
from expertmesh.gates.hashing import hash_gate, random_table
from expertmesh.gates.select import sigmoid_topk, softmax_topk, sqrt_softplus_topk, topk_softmax
from expertmesh.gates.spec import Groups

E = 16
SIZES = [(1, 1), (7, 2), (64, 4), (33, 8)]


def random_logits(*shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def config(k: int, **more) -> SimpleNamespace:
    names = dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "hidden_size"], E)
    return SimpleNamespace(num_experts_per_tok=k, **names, **more)


@torch.no_grad()
def run(router: torch.nn.Module, *inputs: torch.Tensor, bias: torch.Tensor | None = None):
    """What a gate module says, with the identity for its projection."""
    for name, parameter in router.named_parameters():
        if name.endswith("weight"):
            parameter.copy_(torch.eye(E))
    if bias is not None:
        router.e_score_correction_bias.copy_(bias)
    return router.eval()(*inputs)


def matrix(index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(index), E).scatter_(1, index, weights)


def assert_same(choices, index: torch.Tensor, weights: torch.Tensor, *, is_ordered: bool = False) -> None:
    torch.testing.assert_close(choices.spread(E), matrix(index, weights))
    if is_ordered:
        assert torch.equal(choices.index_TK, index)


@pytest.mark.parametrize(("tokens", "k"), SIZES)
@pytest.mark.parametrize(
    ("router", "normalize"),
    [
        (MixtralTopKRouter, True),
        (OlmoeTopKRouter, True),
        (OlmoeTopKRouter, False),
        (Qwen2MoeTopKRouter, False),
        (Qwen3MoeTopKRouter, True),
    ],
)
def test_softmax_topk_is_the_gate_of_mixtral_olmoe_and_qwen(router, normalize: bool, tokens: int, k: int) -> None:
    logits = random_logits(tokens, E)
    _, weights, index = run(router(config(k, norm_topk_prob=normalize)), logits)
    assert_same(softmax_topk(logits, k, normalize=normalize), index, weights, is_ordered=True)


@pytest.mark.parametrize(("tokens", "k"), SIZES)
def test_softmax_topk_is_the_gate_of_dbrx(tokens: int, k: int) -> None:
    logits = random_logits(tokens, E)
    for norm in (None, 1.0):
        module = SimpleNamespace(moe_normalize_expert_weights=norm, top_k=k)
        weights, index = DbrxFFN.route_tokens_to_experts(module, logits)
        assert_same(softmax_topk(logits, k, normalize=norm is not None), index, weights, is_ordered=True)


@pytest.mark.parametrize(("tokens", "k"), SIZES)
def test_softmax_topk_with_groups_is_the_gate_of_deepseek_v2(tokens: int, k: int) -> None:
    logits = random_logits(tokens, E)
    limits = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
    _, weights, index = run(DeepseekV2TopkRouter(config(k, topk_method="group_limited_greedy", **limits)), logits)
    assert_same(softmax_topk(logits, k, scale=16.0, groups=Groups(num=4, kept=2)), index, weights)
    _, weights, index = run(DeepseekV2TopkRouter(config(k, topk_method="greedy", **limits)), logits)
    assert_same(softmax_topk(logits, k, scale=16.0), index, weights)


@pytest.mark.parametrize(("tokens", "k"), SIZES)
def test_softmax_topk_with_a_bias_is_the_gate_of_longcat_and_ernie(tokens: int, k: int) -> None:
    logits, bias = random_logits(tokens, E), random_logits(E) / 20
    router = LongcatFlashTopkRouter(config(k, routed_scaling_factor=6.0, zero_expert_num=0))
    _, weights, index = run(router, logits, bias=bias)
    assert_same(softmax_topk(logits, k, scale=6.0, bias_E=bias), index, weights)
    router = Ernie4_5_MoeTopKRouter(config(k, moe_num_experts=E, moe_norm_min=1e-12))
    router.moe_statics.e_score_correction_bias.data.copy_(bias)
    _, weights, index = run(router, logits)
    assert_same(softmax_topk(logits, k, normalize=True, bias_E=bias), index, weights, is_ordered=True)


@pytest.mark.parametrize(("tokens", "k"), SIZES)
@pytest.mark.parametrize("normalize", [True, False])
def test_sigmoid_topk_with_everything_is_the_gate_of_deepseek_v3(normalize: bool, tokens: int, k: int) -> None:
    logits, bias = random_logits(tokens, E), random_logits(E) / 5
    limits = {"n_group": 4, "topk_group": 2, "norm_topk_prob": normalize, "routed_scaling_factor": 2.5}
    _, weights, index = run(DeepseekV3TopkRouter(config(k, **limits)), logits, bias=bias)
    groups = Groups(num=4, kept=2, score="top2")
    assert_same(sigmoid_topk(logits, k, normalize=normalize, scale=2.5, bias_E=bias, groups=groups), index, weights)


@pytest.mark.parametrize(("tokens", "k"), SIZES)
def test_sigmoid_topk_is_the_gate_of_llama_4(tokens: int, k: int) -> None:
    logits = random_logits(tokens, E)
    scores, _ = run(Llama4Router(config(k)), logits)
    torch.testing.assert_close(sigmoid_topk(logits, k).spread(E), scores)


@pytest.mark.parametrize(("tokens", "k"), SIZES)
def test_sqrt_softplus_and_hash_are_the_gates_of_deepseek_v4(tokens: int, k: int) -> None:
    logits, bias = random_logits(tokens, E), random_logits(E) / 5
    settings = config(k, scoring_func="sqrtsoftplus", routed_scaling_factor=1.5, vocab_size=50)
    _, weights, index = run(DeepseekV4TopKRouter(settings), logits, bias=bias)
    assert_same(sqrt_softplus_topk(logits, k, normalize=True, scale=1.5, bias_E=bias), index, weights)

    router = DeepseekV4HashRouter(settings)
    table = random_table(50, E, k, generator=torch.Generator().manual_seed(1))
    router.tid2eid.copy_(table)
    ids = torch.arange(tokens) * 7 % 50
    _, weights, index = run(router, logits, ids)
    scores = torch.nn.functional.softplus(logits).sqrt()
    assert_same(hash_gate(ids, table, scores_TE=scores, normalize=True, scale=1.5), index, weights, is_ordered=True)


@pytest.mark.parametrize(("tokens", "k"), SIZES)
def test_topk_softmax_is_the_gate_of_gpt_oss_and_jetmoe(tokens: int, k: int) -> None:
    logits = random_logits(tokens, E)
    _, weights, index = run(GptOssTopKRouter(config(k)), logits)
    assert_same(topk_softmax(logits, k), index, weights, is_ordered=True)
    pair_order, pair_token, pair_weights, sizes, _ = run(JetMoeTopKGating(E, E, k), logits)
    gates = torch.zeros(tokens, E)
    gates[pair_token, torch.arange(E).repeat_interleave(torch.tensor(sizes))] = pair_weights
    torch.testing.assert_close(topk_softmax(logits, k).spread(E), gates)
    assert len(pair_order) == tokens * k


@pytest.mark.parametrize("capacity", [1, 2, 5, 64])
def test_switch_is_the_gate_of_switch_transformers(capacity: int) -> None:
    logits = random_logits(3, 40, E)
    settings = config(1, expert_capacity=capacity, router_bias=False, router_jitter_noise=0.0, router_dtype="float32")
    settings.router_ignore_padding_tokens = False
    mask, probs, _ = run(switch_transformers.SwitchTransformersTop1Router(settings), logits)
    for sequence in range(3):
        mine = switch(logits[sequence], capacity=capacity)
        torch.testing.assert_close(mine.spread(E), mask[sequence] * probs[sequence])


@pytest.mark.parametrize("capacity", [1, 3, 8, 100])
@pytest.mark.parametrize("before_dropping", [True, False])
@pytest.mark.parametrize("by_confidence", [True, False])
def test_gshard_is_the_gate_of_nllb_moe(capacity: int, before_dropping: bool, by_confidence: bool) -> None:
    logits = random_logits(50, E)
    settings = config(
        2,
        expert_capacity=capacity,
        router_bias=False,
        router_dtype="float32",
        router_ignore_padding_tokens=False,
        second_expert_policy="all",
        normalize_router_prob_before_dropping=before_dropping,
        batch_prioritized_routing=by_confidence,
        moe_eval_capacity_token_fraction=0.0,
    )
    _, gates, _ = run(NllbMoeTop2Router(settings), logits)
    mine = gshard(logits, capacity=capacity, by_confidence=by_confidence, normalize_kept=not before_dropping)
    torch.testing.assert_close(mine.spread(E), gates)


@pytest.mark.parametrize(("tokens", "k"), SIZES)
def test_switch_loss_times_k_is_the_loss_of_mixtral_for_one_layer(tokens: int, k: int) -> None:
    logits = random_logits(tokens, E)
    probs, index = logits.softmax(dim=1), best_k(logits, k)
    torch.testing.assert_close(k * switch_loss(probs, index), load_balancing_loss_func((logits,), E, k))


def test_padding_left_out_is_padding_masked() -> None:
    logits = random_logits(24, E)
    mask = torch.tensor([[1] * 9 + [0] * 3, [1] * 5 + [0] * 7])
    real = logits[mask.flatten().bool()]
    mine = 2 * switch_loss(real.softmax(dim=1), best_k(real, 2))
    torch.testing.assert_close(mine, load_balancing_loss_func((logits,), E, 2, mask))


def test_switch_loss_and_z_loss_are_those_of_switch_transformers() -> None:
    logits = random_logits(1, 40, E)
    probs, index = logits.softmax(dim=-1), logits.argmax(dim=-1)
    theirs = switch_transformers.load_balancing_loss_func(probs, index)
    torch.testing.assert_close(switch_loss(probs[0], index[0, :, None]), theirs)
    torch.testing.assert_close(z_loss(logits[0]), switch_transformers.router_z_loss_func(logits))
