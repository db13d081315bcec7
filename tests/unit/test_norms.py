"""The norms of a running engine, against the models' own."""

from __future__ import annotations

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from expertmesh.engine.norms import replace_norms

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def norm(kind: type[torch.nn.Module], size: int, dtype: torch.dtype) -> torch.nn.Module:
    found = kind(size, eps=1e-5).to(dtype).requires_grad_(False)
    found.weight.normal_(1.0, 0.3, generator=torch.Generator().manual_seed(1))
    return torch.nn.Sequential(found)


def rows(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [4, 33, 256, 1000])
@pytest.mark.parametrize("kind", [DeepseekV3RMSNorm, MixtralRMSNorm, OlmoeRMSNorm, Qwen3MoeRMSNorm])
def test_a_norm_gives_what_the_layer_gives(kind, size, dtype):
    model, x = norm(kind, size, dtype), rows(2, 7, size, dtype=dtype)
    expected = model(x)
    restore = replace_norms(model)
    assert "forward" in vars(model[0])
    found = model(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert (found != expected).float().mean() < (1 if dtype == torch.float32 else 0.01)
    restore()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_in_any_company(dtype):
    model, x = norm(OlmoeRMSNorm, 1000, dtype), rows(300, 1000, dtype=dtype)
    replace_norms(model)
    whole = model(x)
    for count in (1, 2, 3, 8, 150):
        assert torch.equal(model(x[-count:]), whole[-count:])
    every_other = x[::2]
    assert torch.equal(model(every_other), whole[::2]), "rows that do not lie side by side"


def test_norms_that_compute_something_else_are_left_alone():
    for kind in (Gemma3RMSNorm, GptOssRMSNorm):  # one adds 1 to the weight, the other rounds once
        model, x = norm(kind, 256, torch.bfloat16), rows(5, 256, dtype=torch.bfloat16)
        expected = model(x)
        replace_norms(model)
        assert "forward" not in vars(model[0])
        assert torch.equal(model(x), expected)


def test_rows_of_another_dtype_are_the_layers_own_business():
    model, x = norm(OlmoeRMSNorm, 64, torch.bfloat16), rows(5, 64, dtype=torch.float32)
    expected = model(x)
    replace_norms(model)
    assert torch.equal(model(x), expected)


def test_later_changes_of_the_weight_count():
    model, x = norm(OlmoeRMSNorm, 64, torch.float32), rows(5, 64, dtype=torch.float32)
    replace_norms(model)
    before = model(x)
    model[0].weight.mul_(2)
    assert torch.equal(model(x), 2 * before)
