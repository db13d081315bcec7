"""Runs the Triton kernels: on a GPU where there is one, else in Triton's interpreter.

Triton decides at its import whether it interprets, so the interpreter has a process of its own, and this module, which
that process imports first, imports triton only when it computes.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

from expertmesh.kernels import ExpertKernel
from expertmesh.kernels.spec import DTYPES, ExpertSpec
from tests.kernels.cases import NUM_SLOTS, filled, random_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

RUNNABLE_DTYPES = DTYPES if DEVICE == "cuda" else ("float32", "float16")
"""Triton's interpreter multiplies bfloat16 as if it were integers."""

Compute = Callable[..., np.ndarray]


def compute(spec: ExpertSpec, row_P: list[int], slot_P: list[int], poisoned: int | None = None) -> np.ndarray:
    """Pairs of `random_rows` and `filled` experts, as float32, of which the shorter types are subsets.

    The row `poisoned` is not a number.
    """
    x = random_rows(spec).clone()
    if poisoned is not None:
        x[poisoned] = torch.nan
    return _kernel(spec).run(x, torch.tensor(row_P), torch.tensor(slot_P)).float().numpy()


@contextmanager
def somewhere() -> Iterator[Compute]:
    """`compute`, where it can run."""
    if DEVICE == "cuda":
        yield compute
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _become_interpreter) as interpreter:
        yield lambda *args: interpreter.submit(compute, *args).result()


def _become_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@functools.cache
def _kernel(spec: ExpertSpec) -> ExpertKernel:
    from expertmesh.kernels.triton_kernel import TritonKernel

    return filled(TritonKernel(spec, NUM_SLOTS, DEVICE))
