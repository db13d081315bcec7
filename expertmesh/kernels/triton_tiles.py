"""How a product is cut into tiles on a chip: the tiles to choose from, and which of them a call takes.

Knows no kernel. Its invariant: all tiles of one spec on one chip multiply with one kind of instruction, and none splits
K, so that choosing among them is a matter of speed only. That is a claim about hardware, so `triton_kernel` tries it
on the device at hand and `tilings` is only what it begins with.

A large tile reads a weight once for many rows; a small one wastes less of the matrix unit on rows that are not there
and leaves more programs to hide the latency of memory. Which is better turns on the *company* of a pair: how many
pairs of its expert are in the call, itself included.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from expertmesh.kernels.formats import WeightFormat
    from expertmesh.kernels.spec import ExpertSpec

MAX_PROGRAMS = 2
"""Programs that share a processor. A tile is sized to leave half its shared memory to the other, or to want it all."""


MAX_STAGES = 7
MAX_WEIGHTS = 256
"""What a tensor map copies at once, and what the registers of 8 warps accumulate for 128 rows."""

MIN_SHARED_BYTES = 8 * 1024
"""What moving a result between layouts takes, at least."""

BAND = 8
"""Blocks that tiles go down before the next column: a busy expert's blocks share each piece of its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """What tiles depend on."""

    backend: str
    """"cuda" or "hip"."""
    capability: int = 0
    """CUDA's compute capability times ten; 0 on another backend."""
    shared_bytes: int
    """Shared memory that one program may have."""
    num_processors: int = 1

    @property
    def has_tensor_maps(self) -> bool:
        """Whether an engine copies tiles into shared memory, so that threads need not compute addresses."""
        return self.backend == "cuda" and self.capability >= 90

    @property
    def has_matrix_unit(self) -> bool:
        """Whether Triton multiplies 16-bit floats with matrix instructions on it."""
        return self.backend == "hip" or self.capability >= 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One program's share of a product at a time, and how it is computed."""

    rows: int
    """Pairs: the short side of the matrix instruction."""
    weights: int
    """Rows of weight, gate and up together."""
    depth: int
    """Elements of a stored row of weights per step along K."""
    warps: int
    stages: int
    """Steps along K whose operands are on their way at once."""

    def columns(self, gated: bool) -> int:
        """Columns of the result: a gated product needs two rows of weight for each."""
        return self.weights // 2 if gated else self.weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """The tiles of the two products for calls in which a pair has up to `company` pairs with its expert."""

    company: float
    into: Tile
    out: Tile

    def __post_init__(self) -> None:
        assert self.into.rows == self.out.rows, "both products walk the same blocks"

    @property
    def rows(self) -> int:
        return self.into.rows


def tilings(spec: ExpertSpec, chip: Chip) -> tuple[Tiling, ...]:
    """The safe choice: by company, from few to many."""
    tiles = [fit(tile, spec, chip) for tile in _tiles(spec, chip)]
    limits = [*(float(tile.rows) for tile in tiles[:-1]), math.inf]
    return tuple(Tiling(company=limit, into=tile, out=tile) for limit, tile in zip(limits, tiles, strict=True))


def choose(tilings: tuple[Tiling, ...], company: float) -> Tiling:
    """The first tiling that is meant for as much company; the last for more than any."""
    return next((tiling for tiling in tilings if company <= tiling.company), tilings[-1])


def company(slot_P: NDArray[Any]) -> float:
    """The mean over pairs of how many pairs their slot has: what a tile meets, where a mean over slots would not."""
    _, sizes = np.unique(slot_P, return_counts=True)
    return float(np.square(sizes, dtype=np.int64).sum() / max(1, len(slot_P)))


def fit(tile: Tile, spec: ExpertSpec, chip: Chip) -> Tile:
    """The tile with as many stages as the chip's shared memory holds, then with fewer rows of weight."""
    while shared_bytes(tile, spec, chip) > chip.shared_bytes and tile.stages > 2:
        tile = replace(tile, stages=tile.stages - 1)
    while shared_bytes(tile, spec, chip) > chip.shared_bytes and tile.weights > 64:
        tile = replace(tile, weights=tile.weights // 2)
    return tile


def shared_bytes(tile: Tile, spec: ExpertSpec, chip: Chip) -> int:
    """An upper bound of the shared memory that a program takes. Where threads load for themselves, one of the steps
    on their way is in registers."""
    steps = tile.stages if chip.has_tensor_maps else max(1, tile.stages - 1)
    form = spec.format
    weight_bytes = spec.itemsize if form.is_dense else 1
    row_bytes = form.codes_per_byte * spec.itemsize
    scales = 4 * tile.weights * steps if form.group else 0
    operands = steps * tile.depth * (tile.weights * weight_bytes + tile.rows * row_bytes) + scales
    return max(operands, MIN_SHARED_BYTES) + 1024


def candidates(spec: ExpertSpec, chip: Chip) -> tuple[Tile, ...]:
    """Every tile worth timing: those `tilings` begins with, and their neighbours in weights and depth, each with the
    stages that fill a processor's shared memory alone and in company."""
    found: dict[Tile, None] = {}
    for tile in _tiles(spec, chip):
        found[fit(tile, spec, chip)] = None
        # Groups of columns are summed by steps: another depth would give other bits.
        depths = (tile.depth,) if spec.format.group else (tile.depth, tile.depth * 2)
        for weights, depth, programs in itertools.product(
            (tile.weights, tile.weights * 2), depths, range(1, MAX_PROGRAMS + 1)
        ):
            warps = max(tile.warps, 8 if weights * tile.rows >= 128 * 128 else 4)
            share = replace(chip, shared_bytes=chip.shared_bytes // programs)
            tried = fit(replace(tile, weights=weights, depth=depth, warps=warps, stages=MAX_STAGES), spec, share)
            fits = shared_bytes(tried, spec, chip) <= share.shared_bytes
            if fits and weights == tried.weights <= MAX_WEIGHTS:
                found[tried] = None
    return tuple(found)


def num_programs(tile: Tile, spec: ExpertSpec, chip: Chip, num_tiles: int) -> int:
    """Programs to launch: as many as run at once, each of which then takes one tile after another."""
    per_processor = min(MAX_PROGRAMS, max(1, chip.shared_bytes // shared_bytes(tile, spec, chip)))
    return max(1, min(num_tiles, chip.num_processors * per_processor))


def options(chip: Chip, tile: Tile) -> dict[str, Any]:
    """The compiler's options. On AMD the instruction's shape, which it would else choose by the tile's, is fixed."""
    fixed = {"matrix_instr_nonkdim": 16} if chip.backend == "hip" else {}
    return {"num_warps": tile.warps, "num_stages": tile.stages} | fixed


def product_constants(
    spec: ExpertSpec, chip: Chip, tile: Tile, product: str, *, scatter: bool = False
) -> dict[str, Any]:
    """The compile-time arguments of `triton_ops.product_kernel` for the product "in" or "out": functions of the spec,
    the chip and the tile alone, so that nothing is compiled again for another number of rows."""
    into = product == "in"
    gated = into and spec.gated
    columns = spec.hidden if into else spec.intermediate
    form = spec.format
    stored = form.stored_columns(columns)
    weight_bytes = spec.itemsize if form.is_dense else 1
    return {
        "N": spec.intermediate if into else spec.hidden,
        "K": columns,
        "W": stored,
        "CODE": form.code,
        "GROUP": form.group // form.codes_per_byte,
        "GATHER": into,
        "SCATTER": scatter,
        "GATED": gated,
        "BIASED": spec.bias,
        "ACTIVATION": spec.activation.name if into else "linear",
        "LIMIT": spec.activation.limit,
        "ALPHA": spec.activation.alpha,
        # A tensor map's rows begin at multiples of 16 bytes.
        "TENSOR_MAP": chip.has_tensor_maps and stored * weight_bytes % 16 == 0,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns(gated),
        "BLOCK_K": tile.depth,
        "BAND": BAND,
    }


def _tiles(spec: ExpertSpec, chip: Chip) -> list[Tile]:
    form = spec.format
    if spec.dtype == "float32" or not chip.has_matrix_unit:
        tiles = [
            Tile(rows=16, weights=64, depth=32, warps=4, stages=3),
            Tile(rows=32, weights=64, depth=32, warps=4, stages=3),
        ]
        if form.group:
            tiles = [replace(tile, depth=tile.depth // form.codes_per_byte, warps=8) for tile in tiles]
        return [_stepped(tile, form) for tile in tiles]
    # Hopper's and Blackwell's wide instructions take 64 rows of weight and at least 16 rows of the call: with fewer of
    # either the compiler falls back to older ones. So a gated tile, of two products, has 128 rows of weight or more.
    tiles = [
        Tile(rows=16, weights=128, depth=64, warps=4, stages=6),
        Tile(rows=32, weights=128, depth=64, warps=4, stages=5),
        Tile(rows=64, weights=128, depth=64, warps=4, stages=4),
        Tile(rows=128, weights=256, depth=64, warps=8, stages=4),
    ]
    if form.is_dense:
        return tiles
    # Codes on their way take little memory, but what they are widened to and a group's own sums take registers.
    most = MAX_WEIGHTS if chip.has_tensor_maps and not form.group else 128
    if not chip.has_tensor_maps:
        tiles = [replace(tile, stages=3, depth=32 if form.group else tile.depth) for tile in tiles]
    return [_stepped(replace(tile, weights=min(tile.weights, most)), form) for tile in tiles]


def _stepped(tile: Tile, form: WeightFormat) -> Tile:
    """The tile with steps that end where groups of columns do."""
    return replace(tile, depth=min(tile.depth, form.group // form.codes_per_byte)) if form.group else tile
