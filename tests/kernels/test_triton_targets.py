"""The Triton kernels, compiled for chips that are not here.

`EXPERTMESH_ALL_TARGETS=1` compiles every tiling of many experts, not just the smallest and the largest of one.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from expertmesh.kernels.spec import Activation
from expertmesh.kernels.triton_ops import block_kernel, product_kernel
from expertmesh.kernels.triton_tiles import Chip, options, product_constants, shared_bytes, tilings
from tests.kernels.cases import QUANTIZED, make_spec

ALL = bool(os.environ.get("EXPERTMESH_ALL_TARGETS"))

# Shared memory that one block of threads may have (CUDA C Programming Guide, table 27), and a compute unit's on MI300.
CHIPS = {
    name: Chip(backend=backend, capability=capability, shared_bytes=kib * 1024)
    for name, backend, capability, kib in [
        ("sm_75", "cuda", 75, 64),
        ("sm_80", "cuda", 80, 163),
        ("sm_89", "cuda", 89, 99),
        ("sm_90", "cuda", 90, 227),
        ("sm_100", "cuda", 100, 227),
        ("gfx942", "hip", 0, 64),
    ]
}

INSTRUCTIONS = {
    "sm_75": None,  # Triton multiplies with plain arithmetic there
    "sm_80": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma_f32_16x16x16",
}
"""What the matrix unit of each chip is driven by at its best."""

QWEN = make_spec(2048, 768, dtype="bfloat16")
OTHERS = [
    make_spec(7168, 2048, dtype="bfloat16"),
    make_spec(
        2880, 2880, dtype="bfloat16", bias=True, activation=Activation(name="swiglu_oai", limit=7.0, alpha=1.702)
    ),
    make_spec(1024, 2688, dtype="float16", gated=False, activation=Activation(name="relu2")),
    make_spec(37, 7, dtype="float32", bias=True, activation=Activation(name="gelu_pytorch_tanh")),
    make_spec(2048, 768),
]


def compile_product(spec, chip_name, tile, product):
    """As `TritonKernel` would launch it."""
    chip = CHIPS[chip_name]
    constants = product_constants(spec, chip, tile, product)
    element = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[spec.dtype]
    pointers = [name for name in product_kernel.arg_names if name not in constants]
    signature = {
        name: "*i32" if name.endswith(("row_ptr", "slot_ptr", "block_ptr")) else f"*{element}" for name in pointers
    }
    form = spec.format
    signature["s_ptr"] = "*bf16" if form.scale_dtype == "bfloat16" else "*fp32"
    if not form.is_dense:
        element = {"int8": "i8", "uint8": "u8"}[form.code_dtype]
        signature["w_ptr"] = f"*{element}"
    if constants["TENSOR_MAP"]:
        signature["w_ptr"] = f"tensordesc<{element}[{constants['BLOCK_N']}, {constants['BLOCK_K']}]>"
    source = ASTSource(
        product_kernel, signature | dict.fromkeys(constants, "constexpr"), constants, _aligned(signature)
    )
    return triton.compile(source, target=_target(chip_name), options=options(chip, tile))


def _aligned(signature):
    return {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind in ("*fp32", "*bf16", "*fp16", "*i8", "*u8")
    }


def _target(chip_name):
    chip = CHIPS[chip_name]
    return GPUTarget("hip", chip_name, 64) if chip.backend == "hip" else GPUTarget("cuda", chip.capability, 32)


def instructions(compiled) -> set[str]:
    """The kinds of matrix instruction in it."""
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    return set(re.findall(r"mma\.sync|wgmma(?=\.mma_async)|tcgen05\.mma|v_mfma_[a-z0-9]+_\d+x\d+x\d+", text))


def spilled(compiled, folder) -> int:
    """Registers or bytes kept in memory for want of registers."""
    if "amdgcn" in compiled.asm:
        return sum(map(int, re.findall(r"[vs]gpr_spill_count: *(\d+)", compiled.asm["amdgcn"])))
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", report)
    return int(stack)


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))


def instructions_that_fit(spec, chip_name, tmp_path):
    """The kinds of matrix instructions in all tilings, each of which must fit the chip and spill nothing."""
    chip = CHIPS[chip_name]
    begun = tilings(spec, chip)
    kinds = set()
    for tiling in begun if ALL else (begun[0], begun[-1]):
        for product, tile in (("in", tiling.into), ("out", tiling.out)):
            compiled = compile_product(spec, chip_name, tile, product)
            assert compiled.metadata.shared <= min(chip.shared_bytes, shared_bytes(tile, spec, chip))
            assert spilled(compiled, tmp_path) == 0
            kinds |= instructions(compiled)
    return kinds


@pytest.mark.timeout(1800 if ALL else 180)
@pytest.mark.parametrize("spec", [QWEN, *OTHERS] if ALL else [QWEN], ids=str)
@pytest.mark.parametrize("chip_name", CHIPS)
def test_every_tiling_fits_its_chip_and_uses_one_kind_of_instruction(chip_name, spec, tmp_path):
    if chip_name == "sm_75" and spec.dtype == "bfloat16":
        spec = make_spec(spec.hidden, spec.intermediate, dtype="float16")  # it has no bfloat16
    kinds = instructions_that_fit(spec, chip_name, tmp_path)
    if spec.dtype != "float32":
        assert kinds == ({INSTRUCTIONS[chip_name]} - {None})
    elif CHIPS[chip_name].backend == "cuda":
        assert kinds == set()  # TensorFloat-32 would keep 10 bits of a float32 model's 23


@pytest.mark.timeout(1800 if ALL else 180)
@pytest.mark.parametrize("weight_format", QUANTIZED if ALL else ["int8", "int4_g64", "fp8_block"])
@pytest.mark.parametrize("chip_name", CHIPS)
def test_codes_are_widened_in_registers_for_the_same_instructions(chip_name, weight_format, tmp_path):
    spec = make_spec(2048, 768, dtype="float16" if chip_name == "sm_75" else "bfloat16", weight_format=weight_format)
    kinds = instructions_that_fit(spec, chip_name, tmp_path)
    assert kinds == ({INSTRUCTIONS[chip_name]} - {None})


@pytest.mark.parametrize("chip_name", CHIPS if ALL else ["sm_75", "gfx942"])
def test_the_index_of_blocks_compiles(chip_name, tmp_path):
    signature = {
        "slot_ptr": "*i32",
        "block_ptr": "*i32",
        "num_pairs": "i32",
        "BLOCK_M": "constexpr",
        "CHUNK": "constexpr",
    }
    source = ASTSource(block_kernel, signature, {"BLOCK_M": 16, "CHUNK": 1024}, {})
    assert spilled(triton.compile(source, target=_target(chip_name)), tmp_path) == 0
