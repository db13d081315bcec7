"""The Triton kernels: run on a GPU where there is one and in Triton's interpreter otherwise, and compiled for chips.

Triton decides at its import whether it interprets, so the interpreter has a process of its own.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor

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
from expertmesh.kernels.spec import DTYPES, Activation, ExpertSpec
from expertmesh.kernels.triton_kernel import BLOCK_M, TritonKernel, block_table
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

HAS_GPU = torch.cuda.is_available()
# The interpreter multiplies bfloat16 as integers, so that type is for GPUs only.
RUNNABLE = [*DTYPES] if HAS_GPU else ["float32", "float16"]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that one block of threads may have, by compute capability (CUDA C Programming Guide, table 27)."""


@functools.cache
def kernel_of(spec: ExpertSpec) -> TritonKernel:
    return filled(TritonKernel(spec, NUM_SLOTS, "cuda" if HAS_GPU else "cpu"))


def compute(spec: ExpertSpec, row_P: list[int], slot_P: list[int]) -> np.ndarray:
    """In float32, of which the two shorter types are subsets."""
    return kernel_of(spec).run(random_rows(spec), torch.tensor(row_P), torch.tensor(slot_P)).float().numpy()


def become_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run():
    """`compute`, wherever it can run."""
    if HAS_GPU:
        yield compute
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), become_interpreter) as interpreter:
        yield lambda *args: interpreter.submit(compute, *args).result()


def assert_matches_reference(run, spec, num_pairs):
    row_P, slot_P = random_pairs(num_pairs)
    y = torch.from_numpy(run(spec, row_P.tolist(), slot_P.tolist()))
    expected = filled(ReferenceKernel(spec, NUM_SLOTS)).run(random_rows(spec), row_P, slot_P).float()
    tolerance = TOLERANCE[spec.dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", RUNNABLE)
@pytest.mark.parametrize(
    ("hidden", "intermediate"), [(1, 1), (7, 1), (1, 37), (37, 7), (64, 64), (100, 192), (192, 96)]
)
def test_it_computes_what_the_reference_does(run, hidden, intermediate, dtype):
    spec = make_spec(hidden, intermediate, dtype=dtype, bias=hidden % 2 == 1)
    for num_pairs in (1, 2, 3, 5, 16, 33, 100):
        assert_matches_reference(run, spec, num_pairs)


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS, ids=lambda activation: activation.name)
def test_it_knows_every_gated_activation(run, activation):
    assert_matches_reference(run, make_spec(40, 37, activation=activation), 16)


@pytest.mark.parametrize("activation", UNGATED_ACTIVATIONS, ids=lambda activation: activation.name)
@pytest.mark.parametrize("bias", [False, True])
def test_it_knows_every_ungated_activation(run, activation, bias):
    assert_matches_reference(run, make_spec(40, 37, gated=False, bias=bias, activation=activation), 16)


@pytest.mark.parametrize("dtype", RUNNABLE)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_pairs_bits_are_the_same_in_any_company(run, dtype, data):
    spec = make_spec(37, 70, dtype=dtype, bias=True)
    row_P = list(range(NUM_ROWS)) * NUM_SLOTS
    slot_P = sorted(list(range(NUM_SLOTS)) * NUM_ROWS)
    whole_PH = run(spec, row_P, slot_P)
    chosen = sorted(data.draw(st.lists(st.integers(0, len(row_P) - 1), min_size=1, max_size=50)))
    some_PH = run(spec, [row_P[pair] for pair in chosen], [slot_P[pair] for pair in chosen])
    assert np.array_equal(some_PH, whole_PH[chosen])


@given(slots=st.lists(st.integers(0, 6), min_size=1, max_size=120).map(sorted))
def test_blocks_cover_every_pair_once_and_never_mix_slots(slots):
    covered = []
    for slot, first, last in block_table(np.array(slots)).tolist():
        assert 0 < last - first <= BLOCK_M
        assert set(slots[first:last]) == {slot}
        covered += range(first, last)
    assert covered == list(range(len(slots)))


def test_an_expert_with_many_rows_fills_its_blocks():
    blocks = block_table(np.array([3] * (2 * BLOCK_M + 1) + [5]))
    assert blocks.tolist() == [[3, 0, 16], [3, 16, 32], [3, 32, 33], [5, 33, 34]]


def test_no_pairs_give_no_rows():
    empty = torch.empty(0, dtype=torch.int64)
    spec = make_spec(16, 8)
    assert TritonKernel(spec, 1, "cuda" if HAS_GPU else "cpu").run(random_rows(spec), empty, empty).shape == (0, 16)


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
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
        make_spec(2048, 768, dtype="float32"),
        make_spec(
            2880, 2880, dtype="bfloat16", bias=True, activation=Activation(name="swiglu_oai", limit=7.0, alpha=1.702)
        ),
        make_spec(7168, 3072, dtype="bfloat16", activation=Activation(name="swiglu_clamped", limit=10.0)),
        make_spec(4096, 14336, dtype="float16", activation=Activation(name="gelu")),
        make_spec(1024, 2688, dtype="bfloat16", gated=False, activation=Activation(name="relu2")),
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
