"""The Triton kernels: run on a GPU or in Triton's interpreter, and compiled for chips that are not here."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from expertmesh.errors import ConfigError
from expertmesh.kernels import triton_kernel
from expertmesh.kernels.reference import ReferenceKernel
from expertmesh.kernels.spec import Activation, ExpertSpec
from expertmesh.kernels.triton_kernel import TritonKernel
from tests.kernels.cases import (
    GATED_ACTIVATIONS,
    NUM_ROWS,
    NUM_SLOTS,
    TOLERANCE,
    UNGATED_ACTIVATIONS,
    filled,
    make_spec,
    random_pairs,
    random_rows,
)
from tests.kernels.interpreter import DEVICE, RUNNABLE_DTYPES, somewhere

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that one block of threads may have, by compute capability (CUDA C Programming Guide, table 27)."""


@pytest.fixture(scope="module")
def run():
    with somewhere() as compute:
        yield compute


def assert_matches_reference(run, spec, num_pairs):
    row_P, slot_P = random_pairs(num_pairs)
    y = torch.from_numpy(run(spec, row_P.tolist(), slot_P.tolist()))
    expected = filled(ReferenceKernel(spec, NUM_SLOTS)).run(random_rows(spec), row_P, slot_P).float()
    tolerance = TOLERANCE[spec.dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", RUNNABLE_DTYPES)
@pytest.mark.parametrize(
    ("hidden", "intermediate"), [(1, 1), (7, 1), (1, 37), (37, 7), (64, 64), (100, 192), (192, 96)]
)
def test_it_computes_what_the_reference_does(run, hidden, intermediate, dtype):
    spec = make_spec(hidden, intermediate, dtype=dtype, bias=hidden % 2 == 1)
    for num_pairs in (1, 3, 16, 33, 70):
        assert_matches_reference(run, spec, num_pairs)


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS, ids=lambda activation: activation.name)
def test_it_knows_every_gated_activation(run, activation):
    assert_matches_reference(run, make_spec(40, 37, activation=activation), 16)


@pytest.mark.parametrize("activation", UNGATED_ACTIVATIONS, ids=lambda activation: activation.name)
@pytest.mark.parametrize("bias", [False, True])
def test_it_knows_every_ungated_activation(run, activation, bias):
    assert_matches_reference(run, make_spec(40, 37, gated=False, bias=bias, activation=activation), 16)


def test_a_row_that_is_not_a_number_harms_no_other(run):
    spec = make_spec(37, 70, bias=True)
    row_P = list(range(NUM_ROWS)) * 2
    slot_P = [0] * NUM_ROWS + [1] * NUM_ROWS
    healthy_PH = run(spec, row_P, slot_P)
    for poisoned in (0, 5, NUM_ROWS - 1):
        y_PH = run(spec, row_P, slot_P, poisoned)
        others = np.array(row_P) != poisoned
        assert np.array_equal(y_PH[others], healthy_PH[others])
        assert np.isnan(y_PH[~others]).all()


# In the interpreter numpy multiplies, whose bits do depend on a row's place.
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("dtype", RUNNABLE_DTYPES)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_pairs_bits_are_the_same_in_any_company(run, dtype, data):
    spec = make_spec(300, 170, dtype=dtype, bias=True)
    row_P = list(range(NUM_ROWS)) * NUM_SLOTS
    slot_P = sorted(list(range(NUM_SLOTS)) * NUM_ROWS)
    whole_PH = run(spec, row_P, slot_P)
    chosen = sorted(data.draw(st.lists(st.integers(0, len(row_P) - 1), min_size=1, max_size=50)))
    some_PH = run(spec, [row_P[pair] for pair in chosen], [slot_P[pair] for pair in chosen])
    assert np.array_equal(some_PH, whole_PH[chosen])


def test_no_pairs_give_no_rows():
    empty = torch.empty(0, dtype=torch.int64)
    spec = make_spec(16, 8)
    assert TritonKernel(spec, 1, DEVICE).run(random_rows(spec), empty, empty).shape == (0, 16)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so():
    with pytest.raises(ConfigError, match="finds no GPU"):
        TritonKernel(make_spec(16, 8), 1, "cuda:0")


def compile_for(spec: ExpertSpec, chip: int):
    """Both kernels as `TritonKernel.run` would launch them for `spec` on a chip of that compute capability."""
    element = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[spec.dtype]
    for kernel, constants in zip(
        (triton_kernel.in_kernel, triton_kernel.out_kernel), triton_kernel.constants(spec), strict=True
    ):
        pointers = [name for name in kernel.arg_names if name not in constants]
        signature = {name: "*i32" if name in ("row_ptr", "block_ptr") else element for name in pointers}
        aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(pointers))}
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
        yield triton.compile(source, target=GPUTarget("cuda", chip, 32), options=triton_kernel.OPTIONS)


def spilled_bytes(ptx: str, folder) -> int:
    file = folder / "kernel.ptx"
    file.write_text(ptx)
    target = re.search(r"\.target (\w+)", ptx).group(1)
    report = subprocess.run(
        [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", str(file), "-o", str(folder / "kernel.cubin")],
        check=True,
        capture_output=True,
        text=True,
    ).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", report)))


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize(
    "spec",
    [
        make_spec(2048, 768, dtype="bfloat16"),
        make_spec(
            2880, 2880, dtype="bfloat16", bias=True, activation=Activation(name="swiglu_oai", limit=7.0, alpha=1.702)
        ),
        make_spec(1024, 2688, dtype="float16", gated=False, activation=Activation(name="relu2")),
        make_spec(37, 7, dtype="float32", bias=True, activation=Activation(name="gelu_pytorch_tanh")),
    ],
    ids=lambda spec: f"{spec.hidden}x{spec.intermediate} {spec.dtype}",
)
def test_it_compiles_for_a_chip_without_spilling(spec, chip, tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    compiled = list(compile_for(spec, chip))
    assert [kernel.metadata.name for kernel in compiled] == ["in_kernel", "out_kernel"]
    for kernel in compiled:
        assert kernel.metadata.shared <= SHARED_MEMORY[chip]
        assert spilled_bytes(kernel.asm["ptx"], tmp_path) == 0
        assert ("mma.sync" in kernel.asm["ptx"] or "wgmma" in kernel.asm["ptx"]) == (spec.dtype != "float32")
