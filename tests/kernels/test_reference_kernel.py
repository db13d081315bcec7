"""The reference kernel against closed forms in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from expertmesh.kernels.reference import ReferenceKernel
from expertmesh.kernels.spec import DTYPES, Activation
from tests.kernels.cases import NUM_SLOTS, TOLERANCE, filled, make_spec, random_expert, random_pairs, random_rows


def clamped(gate, up):
    return F.silu(gate.clamp(max=1.5)) * up.clamp(-1.5, 1.5)


def oai(gate, up):
    gate, up = gate.clamp(max=1.5), up.clamp(-1.5, 1.5)
    return gate * torch.sigmoid(gate * 1.702) * (up + 1)


CLOSED_FORMS = [
    (Activation(name="silu"), lambda gate, up: F.silu(gate) * up),
    (Activation(name="gelu"), lambda gate, up: F.gelu(gate) * up),
    (Activation(name="gelu_pytorch_tanh"), lambda gate, up: F.gelu(gate, approximate="tanh") * up),
    (Activation(name="relu2"), lambda gate, up: F.relu(gate) ** 2 * up),
    (Activation(name="swiglu_clamped", limit=1.5), clamped),
    (Activation(name="swiglu_oai", limit=1.5, alpha=1.702), oai),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("activation", "closed_form"), CLOSED_FORMS, ids=[a.name for a, _ in CLOSED_FORMS])
def test_the_reference_is_the_closed_form(activation, closed_form, bias, dtype):
    spec = make_spec(37, 19, dtype=dtype, bias=bias, activation=activation)
    x = random_rows(spec)
    row_P, slot_P = random_pairs(33)
    y = filled(ReferenceKernel(spec, NUM_SLOTS)).run(x, row_P, slot_P)
    assert y.dtype == x.dtype
    for pair, (row, slot) in enumerate(zip(row_P.tolist(), slot_P.tolist(), strict=True)):
        w_in, w_out, b_in, b_out, *_ = (None if t is None else t.double() for t in random_expert(spec, slot))
        gate, up = F.linear(x[row].double(), w_in, b_in).chunk(2)
        expected = F.linear(closed_form(gate, up), w_out, b_out)
        torch.testing.assert_close(y[pair].double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 10)


def test_an_expert_without_a_gate_has_half_the_rows():
    spec = make_spec(16, 24, gated=False, activation=Activation(name="relu2"))
    x = random_rows(spec)
    y = filled(ReferenceKernel(spec, NUM_SLOTS)).run(x, torch.tensor([3]), torch.tensor([2]))
    w_in, w_out, *_ = random_expert(spec, 2)
    torch.testing.assert_close(y[0], w_out @ F.relu(w_in @ x[3]) ** 2)


def test_no_pairs_give_no_rows():
    spec = make_spec(16, 24)
    empty = torch.empty(0, dtype=torch.int64)
    assert filled(ReferenceKernel(spec, 1)).run(random_rows(spec), empty, empty).shape == (0, 16)


def test_a_weight_of_another_shape_or_dtype_is_a_programmers_error():
    spec = make_spec(16, 24)
    kernel = ReferenceKernel(spec, 1)
    good = random_expert(spec, 0)
    for bad in (
        good._replace(w_in=good.w_in[:1]),
        good._replace(w_out=good.w_out.bfloat16()),
        good._replace(b_in=torch.zeros(48)),
    ):
        with pytest.raises(AssertionError, match="the spec wants"):
            kernel.write(0, bad)
