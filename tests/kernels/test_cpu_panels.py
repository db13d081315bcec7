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

needs_pairs = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="this processor has no products of bfloat16 pairs"
)
FORMS = [*DTYPES, pytest.param(cpu_code.PAIRS, marks=needs_pairs)]


@pytest.fixture(autouse=True)
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape, seed=0):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def held(form):
    """The dtype of its weights."""
    return torch.bfloat16 if form == cpu_code.PAIRS else getattr(torch, form)


def product(form, x_RK, sizes, matrices):
    """y_RN by panels, without what fills the last one."""
    is_paired = form == cpu_code.PAIRS
    packed = [cpu_panels.pack_pairs(w, b) if is_paired else cpu_panels.pack(held(form), w, b) for w, b in matrices]
    return cpu_panels.multiply(form, x_RK, sizes, packed)[:, : len(matrices[0][0])]


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


@needs_pairs
@settings(max_examples=25, deadline=None, derandomize=True)
@given(depth=SIZES, num_results=SIZES, num_rows=st.integers(1, 30))
def test_pairs_are_summed_to_within_a_rounding_of_each(depth, num_results, num_rows):
    x_RK, w_NK = normal(num_rows, depth).bfloat16(), normal(num_results, depth, seed=1).bfloat16()
    y_RN = product(cpu_code.PAIRS, x_RK, [num_rows], [(w_NK, None)])
    exact_RN = x_RK.double() @ w_NK.double().T
    bound_RN = depth * 2.0**-24 * (x_RK.double().abs() @ w_NK.double().abs().T)
    assert ((y_RN - exact_RN).abs() <= bound_RN).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(depth=SIZES, num_results=SIZES, sizes=st.lists(st.integers(1, 20), min_size=1, max_size=9), biased=st.booleans())
def test_products_of_small_integers_are_exact(num_threads, form, depth, num_results, sizes, biased):
    torch.set_num_threads(num_threads)
    x_RK = integers(sum(sizes), depth)
    matrices = [
        (integers(num_results, depth, seed=seed), integers(num_results, seed=seed + 100) if biased else None)
        for seed in range(len(sizes))
    ]
    blocks = zip(torch.split(x_RK, sizes), matrices, strict=True)
    expected = torch.cat([x @ w.T + (0.0 if b is None else b) for x, (w, b) in blocks])
    assert torch.equal(product(form, x_RK, sizes, matrices), expected)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(depth=SIZES, num_results=SIZES, num_rows=st.integers(1, 40), num_threads=st.integers(1, 3))
def test_a_row_has_the_same_bits_alone(form, depth, num_results, num_rows, num_threads):
    matrix = (normal(num_results, depth).to(held(form)).float(), None)
    x_RK = normal(num_rows, depth, seed=1)
    torch.set_num_threads(num_threads)
    together = product(form, x_RK, [num_rows], [matrix])
    torch.set_num_threads(1)
    alone = [product(form, x_RK[r : r + 1], [1], [matrix]) for r in range(num_rows)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("form", FORMS)
def test_every_weight_is_widened_exactly(form):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = bits.view(torch.bfloat16).float() if form == "float32" else bits.view(held(form)).float()
    values = values[values.isfinite()]
    if form == cpu_code.PAIRS:  # whose rule is that what is smaller counts as zero
        values = values[(values == 0) | (values.abs() >= torch.finfo(torch.bfloat16).tiny)]
    y_RN = product(form, torch.ones(1, 1), [1], [(values[:, None], None)])
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


LINUX = "x86_64-linux-gnu"
HASWELL, SAPPHIRE_RAPIDS, ZEN_4 = (LINUX, "haswell"), (LINUX, "sapphirerapids"), (LINUX, "znver4")
ARM, APPLE = ("aarch64-linux-gnu", "neoverse-v1"), ("arm64-apple-macosx", "apple-m1")
EVERYWHERE = sorted(set(cpu_code.FORMATS) - {cpu_code.PAIRS})


def assembly_of(form, triple, processor):
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=processor, opt=2)
    return machine.emit_assembly(binding.parse_assembly(str(cpu_code._module(cpu_code.FORMATS[form]))))


@pytest.mark.parametrize(
    ("form", "processor"),
    [
        *itertools.product(EVERYWHERE, [HASWELL, SAPPHIRE_RAPIDS, ARM, APPLE]),
        *itertools.product([cpu_code.PAIRS], [SAPPHIRE_RAPIDS, ZEN_4]),
    ],
)
def test_it_compiles_for_processors_that_are_not_here_without_spilling_a_sum(form, processor):
    assembly = assembly_of(form, *processor)
    assert ("vdpbf16ps" if form == cpu_code.PAIRS else "fm") in assembly  # x86 says vfmadd, ARM fmla
    assert "fmaf" not in assembly  # C's, one number at a time
    assert not re.search(r"(32|64)-byte (Folded )?Spill", assembly)
