"""Which tiles are fastest on the device at hand, found by timing them and kept in a file.

Knows nothing of kernels but how to launch one product with a tile. Its invariant: it chooses only among tiles that
give the same bits, so that a tuned host and an untuned one, or one tuned yesterday, answer alike.

The file is JSON: for each device and each shape of expert, tilings as in `triton_tiles`, by company. Where it says
nothing, `triton_tiles.tilings` is the safe choice.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from expertmesh.errors import ConfigError
from expertmesh.kernels.triton_tiles import Tile, Tiling, candidates, company

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from expertmesh.kernels.spec import ExpertSpec
    from expertmesh.kernels.triton_kernel import TritonKernel

    Measure = Callable[[Callable[[], None]], float]
    """Times a launch: in any unit, as long as it is always the same one."""

FILE_VARIABLE = "EXPERTMESH_TILINGS"
"""Names another file than `~/.cache/expertmesh/tilings.json`."""


def tune(
    kernel: TritonKernel,
    loads: Iterable[Sequence[int]],
    *,
    tiles: Sequence[Tile] | None = None,
    measure: Measure | None = None,
) -> tuple[Tiling, ...]:
    """The fastest tilings for these loads, each a number of pairs per slot, of `tiles` (all candidates unless given).

    Takes minutes, most of them the compiler's. Overwrites slot 0.
    """
    tiles = candidates(kernel.spec, kernel.chip) if tiles is None else tiles
    everything = [Tiling(company=math.inf, into=tile, out=tile) for tile in tiles]
    # Alike as pairs of one tile, so alike in each product: a tile for one may be joined with any for the other.
    alike = [tiling.into for tiling in kernel.agreeing(everything, like=kernel.tilings[0])]
    return merged(_fastest(kernel, alike, load, measure or _median_ms) for load in loads)


def merged(tilings: Iterable[Tiling]) -> tuple[Tiling, ...]:
    """By company, from few to many; of neighbours that differ in nothing else, the last."""
    ordered = sorted(tilings, key=lambda tiling: tiling.company)
    return tuple(
        tiling
        for tiling, after in itertools.zip_longest(ordered, ordered[1:])
        if after is None or (tiling.into, tiling.out) != (after.into, after.out)
    )


def uniform_loads(num_experts: int, top_k: int, token_counts: Iterable[int]) -> list[list[int]]:
    """For each number of tokens, the pairs per expert when every token takes `top_k` of them at random."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.bincount(
            torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices.flatten(), minlength=num_experts
        ).tolist()
        for tokens in token_counts
    ]


def stored(spec: ExpertSpec, device: str, file: Path | None = None) -> tuple[Tiling, ...] | None:
    """What `store` kept for this shape on a device of this name, if anything."""
    path = file or default_file()
    try:
        known = _read(path).get(device, {}).get(_key(spec))
        return known and tuple(
            Tiling(company=entry["company"] or math.inf, into=Tile(**entry["into"]), out=Tile(**entry["out"]))
            for entry in known
        )
    except (AttributeError, KeyError, TypeError, AssertionError) as error:
        raise _unreadable(path) from error


def store(spec: ExpertSpec, device: str, tilings: Sequence[Tiling], file: Path | None = None) -> Path:
    """Keep tilings for this shape on this device, beside what the file says of others."""
    path = file or default_file()
    known = _read(path)
    known.setdefault(device, {})[_key(spec)] = [
        {
            "company": tiling.company if math.isfinite(tiling.company) else None,
            "into": dataclasses.asdict(tiling.into),
            "out": dataclasses.asdict(tiling.out),
        }
        for tiling in tilings
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    # A host that starts meanwhile must not find half a file.
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(known, indent=1) + "\n")
    draft.replace(path)
    return path


def default_file() -> Path:
    return Path(os.environ.get(FILE_VARIABLE, "~/.cache/expertmesh/tilings.json")).expanduser()


def _fastest(kernel: TritonKernel, tiles: Sequence[Tile], load: Sequence[int], measure: Measure) -> Tiling:
    slot_P = np.repeat(np.arange(len(load)), load)
    by_rows: dict[int, list[Tile]] = {}
    for tile in tiles:
        by_rows.setdefault(tile.rows, []).append(tile)
    chosen = []
    for alike in by_rows.values():
        # Each product is timed alone, as the best tile of one says nothing of the other's.
        timed = [
            [(measure(launch), index) for index, launch in enumerate(launches)]
            for launches in zip(*(kernel.launches(tile, slot_P) for tile in alike), strict=True)
        ]
        (into_time, into), (out_time, out) = map(min, timed)
        tiling = Tiling(company=company(slot_P), into=alike[into], out=alike[out])
        chosen.append((into_time + out_time, tiling))
    return min(chosen, key=lambda timed: timed[0])[1]


def _median_ms(launch: Callable[[], None]) -> float:
    from triton.testing import do_bench

    median: float = do_bench(launch, return_mode="median")
    return median


def _key(spec: ExpertSpec) -> str:
    parts = [f"{spec.hidden}x{spec.intermediate}", spec.dtype, "gated" if spec.gated else "ungated"]
    return " ".join(parts if spec.format.is_dense else [*parts, spec.weight_format])


def _read(file: Path) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _unreadable(file) from error
    return known


def _unreadable(file: Path) -> ConfigError:
    return ConfigError(f"{file} holds no tilings that can be read: delete it, or name another in {FILE_VARIABLE}")
