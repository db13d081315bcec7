"""What surrounds products in machine code, against torch's own rounding and float64."""

from __future__ import annotations

import math
import re

import pytest
import torch

from expertmesh.kernels.activation import GATED, POINTWISE, activate
from expertmesh.kernels.spec import DTYPES, Activation

binding = pytest.importorskip("llvmlite.binding")
cpu_row_code = pytest.importorskip("expertmesh.kernels.cpu_row_code")
cpu_panels = pytest.importorskip("expertmesh.kernels.cpu_panels")

POINTWISE_HERE = [Activation(name=name) for name in sorted(cpu_row_code._POINTWISE)]
GATED_HERE = [Activation(name=name, limit=1.5, alpha=1.25) for name in sorted(cpu_row_code._GATED)]


def every_half(dtype: str) -> torch.Tensor:
    """Each bit pattern of 16-bit types; as many float32."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    return bits.view(torch.bfloat16).float() if dtype == "float32" else bits.view(getattr(torch, dtype))


def activated(activation: Activation, h_RN: torch.Tensor, *, gated: bool) -> torch.Tensor:
    a_RI = torch.empty(len(h_RN), h_RN.shape[1] // (2 if gated else 1))
    cpu_panels.make_rows(cpu_row_code.activation_code(activation, gated=gated), h_RN, a_RI)
    return a_RI


def spread(num_rows: int, num_columns: int) -> torch.Tensor:
    """Of all magnitudes, from where curves bend to far past any clamp."""
    generator = torch.Generator().manual_seed(num_columns)
    exponents = torch.rand(num_rows, num_columns, generator=generator) * 8 - 4
    return torch.randn(num_rows, num_columns, generator=generator) * 10**exponents


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_gathered_and_widened_exactly(dtype):
    x_TH = every_half(dtype).view(-1, 2**11 // 8)[:, :251]
    index = torch.tensor([5, 0, 5, 255, 17])
    y_RH = torch.empty(5, 251)
    cpu_panels.make_rows(cpu_row_code.gather_code(dtype), x_TH, y_RH, index=index)
    torch.testing.assert_close(y_RH, x_TH[index].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_rounded_as_torch_rounds(dtype):
    edges = every_half("float32" if dtype == "float32" else dtype).float()
    ties = (edges + torch.roll(edges, 1)) / 2
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    values = torch.cat([edges, ties, torch.nextafter(ties, edges), bits.view(torch.float32)]).view(-1, 61 * 4 + 12)
    for width in (256, 251):
        rounded = torch.empty(len(values), width, dtype=getattr(torch, dtype))
        cpu_panels.make_rows(cpu_row_code.round_code(dtype), values, rounded)
        torch.testing.assert_close(rounded, values[:, :width].to(rounded.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", POINTWISE_HERE + GATED_HERE, ids=lambda activation: activation.name)
@pytest.mark.parametrize("gated", [True, False])
def test_an_activation_is_right_to_float32s_rounding(activation, gated):
    if not gated and activation.name in GATED:
        assert cpu_row_code.activation_code(activation, gated=False) is None
        return
    h_RN = spread(8, 2000)
    exact = activate(h_RN.double(), activation, gated=gated)
    a_RI = activated(activation, h_RN, gated=gated)
    factors = [1 + part.abs() for part in (h_RN.chunk(2, dim=-1) if gated else [h_RN])]
    # Where a result is nearly zero, as far down a curve or at the zero of x + 1, the factors' digits are what counts.
    tolerance = 4e-6 * exact.abs() + 1e-7 * math.prod(factors)
    assert ((a_RI - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("activation", POINTWISE_HERE + GATED_HERE, ids=lambda activation: activation.name)
def test_an_elements_bits_do_not_depend_on_its_place(activation):
    gate, up = spread(1, 37)[0], spread(1, 38)[0, :37]
    whole = activated(activation, torch.cat([gate, up])[None], gated=True)[0]
    for first in range(9):
        for stop in range(first + 1, 38, 5):
            part = torch.cat([gate[first:stop], up[first:stop]])[None]
            assert torch.equal(activated(activation, part, gated=True)[0], whole[first:stop])


def test_what_is_not_a_number_stays_so():
    for activation in POINTWISE_HERE + GATED_HERE:
        assert activated(activation, torch.full((1, 18), torch.nan), gated=True).isnan().all()


def test_activations_that_it_lacks_are_known_to_be_torchs():
    lacking = {name for name in (*POINTWISE, *GATED) if name not in {a.name for a in POINTWISE_HERE + GATED_HERE}}
    assert lacking == {"gelu", "tanh", "swiglu_softcapped"}
    for name in lacking:
        assert cpu_row_code.activation_code(Activation(name=name), gated=True) is None


def test_rows_are_shared_among_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    x = spread(300, 1000)
    y = torch.empty(300, 1000, dtype=torch.bfloat16)
    cpu_panels.make_rows(cpu_row_code.round_code("bfloat16"), x, y)
    torch.set_num_threads(before)
    assert torch.equal(y, x.bfloat16())


@pytest.mark.parametrize(
    ("triple", "processor"),
    [("x86_64-linux-gnu", "haswell"), ("x86_64-linux-gnu", "sapphirerapids"), ("aarch64-linux-gnu", "neoverse-v1")],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_compiles_for_processors_that_are_not_here_and_calls_no_library(triple, processor, dtype):
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=processor, opt=2)

    def compute(m, row, e, count):
        return m.silu(m.load(dtype, row, e))

    module = cpu_row_code._module(dtype, compute, indexed=True)
    assembly = machine.emit_assembly(binding.parse_assembly(str(module)))
    assert not re.search(r"^\s*(call|callq|bl)\s", assembly, re.MULTILINE)
    assert "fma" in assembly or "fmla" in assembly
