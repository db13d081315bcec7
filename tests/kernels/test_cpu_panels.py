"""Products with panels against a chain of C's own `fmaf`, exact integers, and themselves in other company."""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.kernels.formats import FORMATS
from expertmesh.kernels.quantization import decode, quantize_matrix
from expertmesh.kernels.spec import DTYPES

binding = pytest.importorskip("llvmlite.binding")
cpu_code = pytest.importorskip("expertmesh.kernels.cpu_code")
cpu_panels = pytest.importorskip("expertmesh.kernels.cpu_panels")

SIZES = st.integers(1, 150)


@pytest.fixture(autouse=True)
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape, seed=0):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def product(dtype, x_RK, sizes, matrices):
    """y_RN by panels, without what fills the last one."""
    packed = [cpu_panels.pack(getattr(torch, dtype), w, b) for w, b in matrices]
    return cpu_panels.multiply(dtype, x_RK, sizes, packed)[:, : len(matrices[0][0])]


def chain_of_fmaf(x_RK, w_NK, b_N):
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    libm.fmaf.argtypes, libm.fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    y_RN = torch.empty(len(x_RK), len(w_NK))
    for r, n in itertools.product(range(len(x_RK)), range(len(w_NK))):
        total = b_N[n].item()
        for x, w in zip(x_RK[r].tolist(), w_NK[n].tolist(), strict=True):
            total = libm.fmaf(w, x, total)
        y_RN[r, n] = total
    return y_RN


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_is_a_chain_of_fused_multiply_adds(dtype):
    w_NK = normal(45, 37, seed=1).to(getattr(torch, dtype)).float()
    x_RK, b_N = normal(7, 37), normal(45, seed=2)
    assert torch.equal(product(dtype, x_RK, [7], [(w_NK, b_N)]), chain_of_fmaf(x_RK, w_NK, b_N))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(depth=SIZES, num_results=SIZES, sizes=st.lists(st.integers(1, 20), min_size=1, max_size=9), biased=st.booleans())
def test_products_of_small_integers_are_exact(num_threads, dtype, depth, num_results, sizes, biased):
    torch.set_num_threads(num_threads)
    x_RK = integers(sum(sizes), depth)
    matrices = [
        (integers(num_results, depth, seed=seed), integers(num_results, seed=seed + 100) if biased else None)
        for seed in range(len(sizes))
    ]
    blocks = zip(torch.split(x_RK, sizes), matrices, strict=True)
    expected = torch.cat([x @ w.T + (0.0 if b is None else b) for x, (w, b) in blocks])
    assert torch.equal(product(dtype, x_RK, sizes, matrices), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(depth=SIZES, num_results=SIZES, num_rows=st.integers(1, 40), num_threads=st.integers(1, 3))
def test_a_row_has_the_same_bits_alone(dtype, depth, num_results, num_rows, num_threads):
    matrix = (normal(num_results, depth).to(getattr(torch, dtype)).float(), None)
    x_RK = normal(num_rows, depth, seed=1)
    torch.set_num_threads(num_threads)
    together = product(dtype, x_RK, [num_rows], [matrix])
    torch.set_num_threads(1)
    alone = [product(dtype, x_RK[r : r + 1], [1], [matrix]) for r in range(num_rows)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_that_the_dtype_has_is_widened_exactly(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = bits.view(torch.bfloat16).float() if dtype == "float32" else bits.view(getattr(torch, dtype)).float()
    values = values[values.isfinite()]
    y_RN = product(dtype, torch.ones(1, 1), [1], [(values[:, None], None)])
    assert torch.equal(y_RN[0], values)


@pytest.mark.parametrize("code", ["int8", "fp8"])
def test_every_code_is_widened_exactly(code):
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[decode(codes[:, None], FORMATS[code]).flatten().isfinite()]
    values = decode(codes[:, None].view(getattr(torch, FORMATS[code].code_dtype)), FORMATS[code]).flatten()
    packed = cpu_panels.pack_codes(codes[:, None], torch.ones(len(codes)), None)
    y_RN = cpu_panels.multiply(code, torch.ones(1, 1), [1], [packed])
    assert torch.equal(y_RN[0, : len(codes)], values)


@pytest.mark.parametrize("code", ["int8", "fp8"])
def test_an_element_of_codes_is_a_chain_that_its_scale_and_bias_end(code):
    x_RK, b_N, s_N = normal(7, 37), normal(45, seed=2), normal(45, seed=3)
    codes, _ = quantize_matrix(normal(45, 37, seed=1), FORMATS[code])
    y_RN = cpu_panels.multiply(code, x_RK, [7], [cpu_panels.pack_codes(codes, s_N, b_N)])[:, :45]
    chain_RN = chain_of_fmaf(x_RK, decode(codes, FORMATS[code]), torch.zeros(45))
    scaled = [
        chain_of_fmaf(chain_RN[:, n : n + 1], s_N[n : n + 1, None], b_N[n : n + 1])[:, 0] for n in range(len(s_N))
    ]
    assert torch.equal(y_RN, torch.stack(scaled, 1))


@pytest.mark.parametrize("dtype", cpu_code.FORMATS)
@pytest.mark.parametrize(
    ("triple", "processor"),
    [
        ("x86_64-linux-gnu", "haswell"),
        ("x86_64-linux-gnu", "sapphirerapids"),
        ("aarch64-linux-gnu", "neoverse-v1"),
        ("arm64-apple-macosx", "apple-m1"),
    ],
)
def test_it_compiles_for_processors_that_are_not_here_without_spilling_a_sum(triple, processor, dtype):
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=processor, opt=2)
    assembly = machine.emit_assembly(binding.parse_assembly(str(cpu_code._module(cpu_code.FORMATS[dtype]))))
    assert "fma" in assembly or "fmla" in assembly
    assert "fmaf" not in assembly  # C's, one number at a time
    assert not re.search(r"(32|64)-byte (Folded )?Spill", assembly)
