"""The linear layers of a running engine, against torch's own in double precision."""

from __future__ import annotations

import pytest
import torch
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from expertmesh.engine.linears import pack_gates, pack_linears

SIZES = [(64, 96), (40, 33), (200, 7), (512, 1000)]


def layer(num_columns: int, num_results: int, dtype: torch.dtype, *, bias: bool) -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(num_columns, num_results, bias=bias, dtype=dtype)).requires_grad_(False)


def rows(count: int, num_columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, num_columns, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_columns", "num_results"), SIZES)
def test_a_packed_layer_gives_what_the_layer_gives(num_columns, num_results, dtype, bias):
    model = layer(num_columns, num_results, dtype, bias=bias)
    x = rows(6, num_columns, dtype).view(2, 3, num_columns)
    expected = torch.nn.functional.linear(
        x.double(), model[0].weight.double(), model[0].bias.double() if bias else None
    )
    pack_linears(model)
    found = model(x)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    assert found.is_contiguous()
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_any_company(dtype):
    model = layer(256, 96, dtype, bias=True)
    x = rows(1100, 256, dtype)
    pack_linears(model)
    whole = model(x)
    for count in (1, 2, 3, 4, 5, 7, 8, 16, 31, 64, 129, 1025):
        assert torch.equal(model(x[-count:]), whole[-count:])


def test_the_way_back_leaves_the_model_as_it_was():
    model = layer(64, 32, torch.float32, bias=True)
    x = rows(5, 64, torch.float32)
    before = model(x)
    restore = pack_linears(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert model(x).abs().max() > 1, "the packed copy is in use"
    restore()
    restore()
    assert torch.equal(model(x), model[0].bias.expand(5, -1))
    assert not torch.equal(before, model(x))
    assert vars(model[0]).keys() == vars(layer(64, 32, torch.float32, bias=True)[0]).keys()


class Doubled(torch.nn.Linear):
    """A layer that is more than its product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_layers_that_do_more_or_that_were_wrapped_are_left_alone():
    model = torch.nn.Sequential(Doubled(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, dtype=torch.float64))
    wrapped = model[1].forward = lambda x: x + 1
    x = rows(3, 8, torch.float32)
    expected = 2 * torch.nn.functional.linear(x, model[0].weight, model[0].bias) + 1
    restore = pack_linears(model)
    assert torch.equal(model[1](model[0](x)), expected)
    restore()
    assert model[1].forward is wrapped


GATES = {
    "mixtral": lambda: MixtralTopKRouter(MixtralConfig(hidden_size=96, num_local_experts=12)),
    "deepseek": lambda: DeepseekV3TopkRouter(
        DeepseekV3Config(hidden_size=96, n_routed_experts=12, n_group=2, topk_group=1, num_experts_per_tok=2)
    ),
    "gpt_oss": lambda: GptOssTopKRouter(GptOssConfig(hidden_size=96, num_local_experts=12)),
    "llama4": lambda: Llama4Router(Llama4TextConfig(hidden_size=96, num_local_experts=12)),
}


def gate(family: str, dtype: torch.dtype) -> torch.nn.Sequential:
    found = GATES[family]().to(dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in found.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    for buffer in found.buffers():
        buffer.zero_()
    return torch.nn.Sequential(found)


def logits(model: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """[rows, experts], which some gates return first, some last and some alone."""
    found = model(x)
    parts = found if isinstance(found, tuple) else (found,)
    (of_all,) = [part for part in parts if part.shape == (len(x), 12) and part.min() < 0]
    return of_all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", GATES)
def test_a_packed_gate_says_the_same_and_of_a_row_in_any_company(family, dtype):
    model, x = gate(family, dtype), rows(40, 96, dtype)
    expected = logits(model, x)
    restore = pack_gates(model)
    found = logits(model, x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    for count in (1, 2, 3, 5, 17):
        assert torch.equal(logits(model, x[-count:]), found[-count:])
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert torch.equal(logits(model, x), found), "the packed copy is in use"
    restore()
    assert "forward" not in vars(model[0])
