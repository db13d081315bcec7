"""The check that a machine computes rows independently, on functions that do and do not; and the fingerprint."""

from __future__ import annotations

import pytest
import torch

from expertmesh.kernels.cpu import CpuKernel
from expertmesh.kernels.reference import ReferenceKernel
from expertmesh.kernels.selfcheck import fingerprint, is_row_invariant, probe_rows, probe_weights
from expertmesh.kernels.spec import DTYPES
from tests.kernels.cases import make_spec

SPEC = make_spec(37, 19, bias=True)
X = probe_rows(SPEC, 128)


def vectorised(x):
    """Takes four rows at a time through one formula and the leftover ones through another."""
    body = len(x) // 4 * 4
    return torch.cat([x[:body] * 3.0, x[body:] * 3.0000002])


def test_a_function_of_each_row_passes():
    assert is_row_invariant(lambda x: torch.stack([row.exp() for row in x]), X)


@pytest.mark.parametrize(
    "ffn",
    [vectorised, lambda x: x - x.mean(0), lambda x: x * (1.0000001 if len(x) == 1 else 1.0), lambda x: x * len(x)],
    ids=["vectorised", "centred", "alone", "counting"],
)
def test_a_function_of_a_rows_company_does_not(ffn):
    assert not is_row_invariant(ffn, X)


@pytest.mark.parametrize("dtype", DTYPES)
def test_probes_have_the_specs_shapes_and_are_of_magnitude_one(dtype):
    spec = make_spec(300, 200, dtype=dtype, bias=True)
    probe_weights(spec).check(spec)
    kernel = ReferenceKernel(spec, 1)
    kernel.write(0, probe_weights(spec))
    zeros = torch.zeros(64, dtype=torch.int64)
    y = kernel.run(probe_rows(spec, 64), torch.arange(64), zeros).float()
    assert 0.1 < y.std() < 10


def test_a_fingerprint_names_the_bits():
    assert fingerprint(CpuKernel(SPEC, 2)) == fingerprint(CpuKernel(SPEC, 2))

    class Nudged(ReferenceKernel):
        def run(self, x_TH, row_P, slot_P):
            y_PH = super().run(x_TH, row_P, slot_P)
            y_PH[3, 5] = torch.nextafter(y_PH[3, 5], torch.tensor(9.0))
            return y_PH

    assert fingerprint(Nudged(SPEC, 1)) != fingerprint(ReferenceKernel(SPEC, 1))


def test_a_fingerprint_leaves_the_slot_unwritten():
    kernel = CpuKernel(SPEC, 1)
    fingerprint(kernel)
    zero = torch.tensor([0])
    with pytest.raises(AssertionError, match="never written"):
        kernel.run(probe_rows(SPEC, 1), zero, zero)
