"""The linear layers of a running engine, against torch's own in double precision."""

from __future__ import annotations

import pytest
import torch

from expertmesh.engine.linears import pack_linears

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
