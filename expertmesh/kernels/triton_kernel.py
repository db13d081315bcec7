"""The expert FFN on a GPU: two grouped products over blocks of pairs, for any number of experts at once.

Owns the slabs: one tensor of all slots' weights per matrix, so that a block finds its expert by a slot number and a
launch mixes rows of different layers and requests. Its invariant: a pair's bits depend on nothing but its row and its
expert. Calls of different sizes go through different tiles, and that these give the same bits is tried on the device
at hand before the first expert is loaded; tiles that do not agree with the most of them are not used.

Rounding: products and activation accumulate in float32; a and y are rounded to the spec's dtype.

Shapes: S slots, T token rows, P pairs, B blocks, R probe rows, H hidden, I intermediate.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from expertmesh.errors import ConfigError
from expertmesh.kernels import triton_ops, tuning
from expertmesh.kernels.blocks import cut
from expertmesh.kernels.selfcheck import is_row_invariant, probe_rows, probe_weights
from expertmesh.kernels.triton_tiles import Chip, choose, company, num_programs, options, product_constants, tilings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from expertmesh.kernels.spec import ExpertSpec, ExpertWeights
    from expertmesh.kernels.triton_tiles import Tile, Tiling

logger = logging.getLogger(__name__)

INTERPRETED = Chip(backend="cuda", capability=90, shared_bytes=227 * 1024, num_processors=3)
"""What Triton's interpreter stands for: a small Hopper, so that programs take several tiles each."""

PROBE_ROWS = 200
"""Rows of the start-up check: more than the largest tile has, and not a multiple of any."""

CHUNK = 1024
"""Pairs that the index is built from at a time."""


class TritonKernel:
    """`ExpertKernel` on one GPU; or on "cpu" in Triton's interpreter (TRITON_INTERPRET=1), to test without one."""

    def __init__(self, spec: ExpertSpec, num_slots: int, device: str = "cuda", *, chip: Chip | None = None) -> None:
        if device != "cpu" and not torch.cuda.is_available():
            raise ConfigError(f"device {device!r} cannot be used: torch finds no GPU here; use device 'cpu'")
        assert device != "cpu" or spec.dtype != "bfloat16", "Triton's interpreter multiplies bfloat16 as integers"
        self.spec = spec
        self.num_slots = num_slots
        self.device = torch.device(device)
        self.chip = chip or chip_of(self.device)
        self._dtype = getattr(torch, spec.dtype)
        self.slabs = {
            name: torch.empty(num_slots, *shape, dtype=getattr(torch, dtype), device=self.device)
            for name, (dtype, shape) in spec.stored.items()
        }
        self._tensor_maps: dict[tuple[str, int, int], TensorDescriptor] = {}
        self.tilings = tilings(spec, self.chip)
        """By company, from few to many; all give the same bits."""
        if self.device.type == "cuda":
            tuned = tuning.stored(spec, torch.cuda.get_device_name(self.device))
            self.tilings = self.agreeing(tuned or self.tilings)

    def write(self, slot: int, weights: ExpertWeights) -> None:
        weights.check(self.spec)
        for name, slab in self.slabs.items():
            slab[slot].copy_(getattr(weights, name))

    def clear(self, slot: int) -> None:
        """Nothing to do: a slab's memory is held for its slots."""

    @torch.no_grad()
    def run(self, x_TH: Tensor, row_P: Tensor, slot_P: Tensor) -> Tensor:
        num_pairs = len(row_P)
        if num_pairs == 0:
            return x_TH.new_empty(0, self.spec.hidden)
        slots = slot_P.numpy()
        tiling = choose(self.tilings, company(slots))
        firsts = [block.first for block in cut(slots, tiling.rows)]
        # One array, as every copy to the device has a fixed cost.
        index = torch.from_numpy(
            np.concatenate(
                [row_P.numpy(), slots, [len(firsts), *firsts, num_pairs]], dtype=np.int32, casting="same_kind"
            )
        )
        with self._current():
            x = self._to_device(x_TH)
            index = self._to_device(index)
            row, slot, block = index[:num_pairs], index[num_pairs : 2 * num_pairs], index[2 * num_pairs :]
            _, y_PH = self.products(tiling, x, row, slot, block)
            return self._to_host(y_PH)

    @torch.no_grad()
    def run_on_device(self, x_TH: Tensor, row_P: Tensor, slot_P: Tensor, company: float | None = None) -> Tensor:
        """`run` for tensors that are on the device already, with pairs in any order; the result stays there.

        The host learns nothing of the pairs, so a CUDA graph can hold the call. It cannot choose a tiling by them
        either: `company` says what to expect (by default, pairs spread evenly over all slots).
        """
        num_pairs = len(row_P)
        tiling = choose(self.tilings, num_pairs / self.num_slots if company is None else company)
        with self._current():
            slot, order = torch.sort(slot_P)
            slot = slot.to(torch.int32)
            block = self.index(tiling, slot)
            _, y_PH = self.products(
                tiling, x_TH, row_P[order].to(torch.int32), slot, block, place=order.to(torch.int32)
            )
            return y_PH

    def index(self, tiling: Tiling, slot_P: Tensor) -> Tensor:
        """The index of blocks of int32 slots that lie grouped on the device, as large as it could become."""
        num_pairs = len(slot_P)
        max_blocks = num_pairs // tiling.rows + min(num_pairs, self.num_slots)
        block = torch.empty(max_blocks + 2, dtype=torch.int32, device=self.device)
        triton_ops.block_kernel[(1,)](slot_P, block, num_pairs, BLOCK_M=tiling.rows, CHUNK=CHUNK)
        return block

    @torch.no_grad()
    def agreeing(self, tilings: Sequence[Tiling], like: Tiling | None = None) -> tuple[Tiling, ...]:
        """Those of `tilings` that give the bits of `like`, or else the most that give the same bits as one another;
        for every row and in any company.

        Writes the probe expert into slot 0. What is compared is not yet rounded to the spec's dtype, where a
        difference in the order of a sum would mostly vanish, and would show up in one element of thousands.
        Compiles every kernel of the tilings, so that no request waits for that.
        """
        self.write(0, probe_weights(self.spec))
        x_RH = probe_rows(self.spec, PROBE_ROWS)
        by_bits: dict[bytes, list[Tiling]] = {}
        for tiling in tilings:
            unrounded = functools.partial(self._probe, tiling, dtype=torch.float32)
            try:
                self._probe(tiling, x_RH, dtype=self._dtype)
                passed = is_row_invariant(unrounded, x_RH)
            except (RuntimeError, triton.OutOfResources):  # a compiler refuses a tile only when it has tried
                continue
            if passed:
                by_bits.setdefault(unrounded(x_RH).numpy().tobytes(), []).append(tiling)
        agreed = max(by_bits.values(), key=len, default=[])
        if like is not None:
            agreed = by_bits.get(self._probe(like, x_RH, dtype=torch.float32).numpy().tobytes(), [])
        if not agreed:
            raise ConfigError(
                f"no tile computes a row of {self.spec} independently of the others on {self.device}: "
                "try another release of triton, or device 'cpu'"
            )
        if len(agreed) < len(tilings):
            logger.warning("%s: %d of %d tilings agree and may be used", self.device, len(agreed), len(tilings))
        return tuple(agreed)

    def launches(self, tile: Tile, slot_P: NDArray[np.int64]) -> tuple[Callable[[], None], Callable[[], None]]:
        """Launches of each product alone with a tile, on random rows and pairs of these slots: what a tuner times."""
        spec, num_pairs = self.spec, len(slot_P)
        firsts = [block.first for block in cut(slot_P, tile.rows)]
        x_PH, a_PI = (
            torch.randn(num_pairs, width, device=self.device).to(self._dtype)
            for width in (spec.hidden, spec.intermediate)
        )
        row, slot, block = (
            torch.tensor(values, dtype=torch.int32, device=self.device)
            for values in (np.arange(num_pairs), slot_P, [len(firsts), *firsts, num_pairs])
        )
        into, out = torch.empty_like(a_PI), torch.empty_like(x_PH)

        def launch_in() -> None:
            with self._current():
                self._product("in", tile, x_PH, row, slot, block, into, None)

        def launch_out() -> None:
            with self._current():
                self._product("out", tile, a_PI, None, slot, block, out, None)

        return launch_in, launch_out

    def _probe(self, tiling: Tiling, x_RH: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Slot 0's a and y side by side, in `dtype`."""
        num_rows = len(x_RH)
        firsts = range(0, num_rows, tiling.rows)
        with self._current():
            row = torch.arange(num_rows, dtype=torch.int32, device=self.device)
            block = torch.tensor([len(firsts), *firsts, num_rows], dtype=torch.int32, device=self.device)
            x = x_RH.to(self.device)
            return torch.cat(self.products(tiling, x, row, torch.zeros_like(row), block, dtype=dtype), 1).cpu()

    def products(
        self,
        tiling: Tiling,
        x_TH: Tensor,
        row_P: Tensor,
        slot_P: Tensor,
        block: Tensor,
        *,
        place: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """a and y of pairs grouped by slot, each stored in `dtype` (the spec's unless given).

        All on the device, indices int32; block is the `index` of slot_P; pair p's y goes to row `place[p]`.
        """
        spec, num_pairs = self.spec, len(row_P)
        a_PI = x_TH.new_empty(num_pairs, spec.intermediate, dtype=dtype)
        y_PH = x_TH.new_empty(num_pairs, spec.hidden, dtype=dtype)
        self._product("in", tiling.into, x_TH, row_P, slot_P, block, a_PI, None)
        self._product("out", tiling.out, a_PI.to(self._dtype), None, slot_P, block, y_PH, place)
        return a_PI, y_PH

    def _product(
        self,
        name: str,
        tile: Tile,
        x_TK: Tensor,
        x_row_P: Tensor | None,
        slot_P: Tensor,
        block: Tensor,
        y_PN: Tensor,
        y_row_P: Tensor | None,
    ) -> None:
        constants = product_constants(self.spec, self.chip, tile, name, scatter=y_row_P is not None)
        w = self.slabs[f"w_{name}"]
        max_tiles = (len(block) - 2) * triton.cdiv(constants["N"], constants["BLOCK_N"])
        triton_ops.product_kernel[(num_programs(tile, self.spec, self.chip, max_tiles),)](
            x_TK,
            x_row_P,
            slot_P,
            block,
            self._tensor_map(f"w_{name}", constants["BLOCK_N"], tile.depth) if constants["TENSOR_MAP"] else w,
            self.slabs.get(f"s_{name}"),
            self.slabs.get(f"b_{name}"),
            y_PN,
            y_row_P,
            **constants,
            **options(self.chip, tile),
        )

    def _tensor_map(self, name: str, rows: int, columns: int) -> TensorDescriptor:
        key = (name, rows, columns)
        if key not in self._tensor_maps:
            self._tensor_maps[key] = TensorDescriptor.from_tensor(self.slabs[name].flatten(0, 1), [rows, columns])
        return self._tensor_maps[key]

    def _current(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _to_host(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return host


def chip_of(device: torch.device) -> Chip:
    """What `device` is; `INTERPRETED` for a CPU."""
    if device.type == "cpu":
        return INTERPRETED
    driver = triton.runtime.driver.active
    with torch.cuda.device(device):
        target = driver.get_current_target()
        properties = driver.utils.get_device_properties(torch.cuda.current_device())
    return Chip(
        backend=target.backend,
        capability=target.arch if target.backend == "cuda" else 0,
        shared_bytes=properties["max_shared_mem"],
        num_processors=properties["multiprocessor_count"],
    )
