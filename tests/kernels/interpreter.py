"""Runs the Triton kernels: on a GPU where there is one, else in Triton's interpreter.

Triton decides at its import whether it interprets, so the interpreter has a process of its own, and this module, which
that process imports first, imports triton only when it computes.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from expertmesh.kernels.spec import DTYPES, ExpertSpec
from tests.kernels.cases import NUM_SLOTS, filled, random_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

RUNNABLE_DTYPES = DTYPES if DEVICE == "cuda" else ("float32", "float16")
"""Triton's interpreter multiplies bfloat16 as if it were integers."""


def compute(
    spec: ExpertSpec, row_P: list[int], slot_P: list[int], *, poisoned: int | None = None, way: str = "run"
) -> np.ndarray:
    """Pairs of `random_rows` and `filled` experts, as float32, of which the shorter types are subsets.

    The row `poisoned` is not a number. `way` is a method of the kernel, or "plain": `run` without tensor maps.
    """
    x = random_rows(spec).clone()
    if poisoned is not None:
        x[poisoned] = torch.nan
    pairs = torch.tensor(row_P), torch.tensor(slot_P)
    if way == "run_on_device":
        return _kernel(spec).run_on_device(*(tensor.to(DEVICE) for tensor in (x, *pairs))).float().cpu().numpy()
    return _kernel(spec, tensor_maps=way == "run").run(x, *pairs).float().numpy()


def cut_on_device(slot_P: list[int], rows: int) -> list[int]:
    """What `block_kernel` makes of these slots, in chunks of 32 so that there are several."""
    from expertmesh.kernels.triton_ops import block_kernel

    block = torch.full((len(slot_P) + 2,), -1, dtype=torch.int32, device=DEVICE)
    slot = torch.tensor(slot_P, dtype=torch.int32, device=DEVICE)
    block_kernel[(1,)](slot, block, len(slot_P), BLOCK_M=rows, CHUNK=32)
    return block.tolist()


@contextmanager
def somewhere() -> Iterator[Callable[..., Any]]:
    """Calls functions of this module where they can run."""
    if DEVICE == "cuda":
        yield lambda function, *args, **kwargs: function(*args, **kwargs)
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _become_interpreter) as interpreter:
        yield lambda *args, **kwargs: interpreter.submit(*args, **kwargs).result()


def _become_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@functools.cache
def _kernel(spec: ExpertSpec, *, tensor_maps: bool = True) -> Any:
    from expertmesh.kernels.triton_kernel import TritonKernel, chip_of

    chip = chip_of(torch.device(DEVICE))
    chip = chip if tensor_maps or chip.backend != "cuda" else replace(chip, capability=80)
    return filled(TritonKernel(spec, NUM_SLOTS, DEVICE, chip=chip))


def bench_sides(weight_format: str = "dense") -> dict[str, np.ndarray]:
    """What every side of the bench computes for one small routing."""
    from expertmesh.bench.kernel_gpu import Shape, random_routing, sides
    from expertmesh.kernels.triton_kernel import TritonKernel

    shape = Shape(num_experts=NUM_SLOTS, top_k=2, hidden=64, intermediate=48)
    kernel = filled(TritonKernel(shape.spec("float32", weight_format), shape.num_experts, DEVICE))
    routing = random_routing(shape, 11, "float32", DEVICE, seed=0)
    return {name: side(routing)().cpu().numpy() for name, side in sides(kernel).items()}


def bench_fill(weight_format: str) -> tuple[float, float]:
    """The root mean squares of weights that the bench draws: of w_in and of w_out, times the root of their columns."""
    from expertmesh.bench.kernel_gpu import Shape, _fill
    from expertmesh.kernels.quantization import dequantize_matrix
    from expertmesh.kernels.triton_kernel import TritonKernel

    spec = Shape(num_experts=1, top_k=1, hidden=128, intermediate=256).spec("float32", weight_format)
    kernel = TritonKernel(spec, 1, DEVICE)
    _fill(kernel)
    found = []
    for name, columns in (("in", spec.hidden), ("out", spec.intermediate)):
        w = kernel.slabs[f"w_{name}"][0].cpu()
        if not spec.format.is_dense:
            w = dequantize_matrix(w, kernel.slabs[f"s_{name}"][0].cpu(), spec.format, columns)
        found.append(float(w.square().mean().sqrt()) * columns**0.5)
    return found[0], found[1]


def tune(spec: ExpertSpec, loads: list[list[int]]) -> tuple[list[Any], tuple[Any, ...], bool]:
    """Three tiles, the tuner's choice if each launch is faster than the last, and whether it agrees with the first."""
    from expertmesh.kernels import tuning
    from expertmesh.kernels.triton_kernel import TritonKernel
    from expertmesh.kernels.triton_tiles import candidates

    kernel = TritonKernel(spec, NUM_SLOTS, DEVICE)
    tiles = list(candidates(spec, kernel.chip)[:3])
    launches = itertools.count()
    tuned = tuning.tune(kernel, loads, tiles=tiles, measure=lambda _: -float(next(launches)))
    return tiles, tuned, kernel.agreeing(tuned, like=kernel.tilings[0]) == tuned
