"""`expertmesh bench kernel --device cpu`: the experts of one layer, against what a user would run instead.

Every side gets the same rows, experts and routing weights and returns the weighted sum of each row's experts, with the
same number of threads. Before each timed call the machine reads written memory as fast as it can: that is the ceiling
that the call is held against, and it leaves no weights in the caches, as the layers between do not either.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from expertmesh.allocator import huge_pages
from expertmesh.bench.measure import Spread, environment, ratios
from expertmesh.kernels.cpu import CpuKernel, plain
from expertmesh.kernels.spec import Activation, ExpertSpec, ExpertWeights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

TOKENS = (1, 4, 16, 32, 256)
STREAM_BYTES = 256 * 2**20
MAX_COPIED_BYTES = 2**30
"""The batched path of transformers copies an expert for each pair: it is left out where that would be more."""

OURS = "expertmesh"
GROUPED, BATCHED, EAGER = (f"transformers {name}" for name in ("grouped_mm", "batched_mm", "eager"))
LOOP, LOOP_FLOAT32 = "loop of F.linear", "loop of F.linear, float32 weights"

Layer = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""x_TH, index_TK and weight_TK -> y_TH."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of one layer's experts."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int

    @property
    def spec(self) -> ExpertSpec:
        return ExpertSpec(
            hidden=self.hidden,
            intermediate=self.intermediate,
            activation=Activation(name="silu"),
            dtype="bfloat16",
        )


SHAPES = (
    Shape(experts=32, hidden=1024, intermediate=512, top_k=4),
    Shape(experts=64, hidden=1024, intermediate=512, top_k=8),
    Shape(experts=32, hidden=2048, intermediate=768, top_k=8),
)


def run(*, rounds: int = 15, shapes: Sequence[Shape] = SHAPES, tokens: Sequence[int] = TOKENS) -> dict[str, Any]:
    """Measure all sides at all sizes, in torch's number of threads: a JSON-able report."""
    return {
        "bench": "kernel",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16",
        "rounds": rounds,
        "shapes": [_measure_shape(shape, tokens, rounds) for shape in shapes],
        "environment": environment(f"expertmesh bench kernel --rounds {rounds} --json"),
    }


@torch.no_grad()
def _measure_shape(shape: Shape, tokens: Sequence[int], rounds: int) -> dict[str, Any]:
    w_in = _noise((shape.experts, 2 * shape.intermediate, shape.hidden))
    w_out = _noise((shape.experts, shape.hidden, shape.intermediate))
    kernel = CpuKernel(shape.spec, shape.experts)
    layers = _theirs(shape, w_in, w_out) | {
        OURS: _layer(_filled(kernel, w_in, w_out)),
        LOOP: _layer(_filled(CpuKernel(shape.spec, shape.experts, plain(LOOP, torch.bfloat16)), w_in, w_out)),
        LOOP_FLOAT32: _layer(_filled(CpuKernel(shape.spec, shape.experts, plain(LOOP_FLOAT32)), w_in, w_out)),
    }
    stream = huge_pages(STREAM_BYTES).view(torch.float64).fill_(1.0)
    return {
        "shape": asdict(shape),
        "arithmetic": kernel.arithmetic.name,
        "at": [_measure(shape, layers, stream, num_tokens, rounds) for num_tokens in tokens],
    }


def _measure(shape: Shape, layers: Mapping[str, Layer], stream: Tensor, num_tokens: int, rounds: int) -> dict[str, Any]:
    expert_bytes = shape.spec.num_bytes
    sides = {
        name: layer
        for name, layer in layers.items()
        if name != BATCHED or num_tokens * shape.top_k * expert_bytes <= MAX_COPIED_BYTES
    }
    x_TH = _noise((num_tokens, shape.hidden), scale=shape.hidden**0.5)
    _check_alike(sides, x_TH, _routing(shape, num_tokens, 0))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    streams: list[float] = []
    shares: list[float] = []
    active: list[int] = []
    for number in range(rounds):
        routing = _routing(shape, num_tokens, number)
        active.append(len(set(routing[0].flatten().tolist())) * expert_bytes)
        for name, layer in sides.items():
            streams.append(STREAM_BYTES / _seconds(stream.sum))
            seconds[name].append(_seconds(functools.partial(layer, x_TH, *routing)))
            if name == OURS:
                shares.append(active[-1] / seconds[name][-1] / streams[-1])
    baselines = [name for name in sides if name != OURS]
    fastest = min(baselines, key=lambda name: statistics.median(seconds[name]))
    flops = 2 * shape.spec.num_parameters * num_tokens * shape.top_k
    return {
        "tokens": num_tokens,
        "active_bytes": round(statistics.mean(active)),
        "milliseconds": {name: Spread.of([1e3 * s for s in of]).to_json(4) for name, of in seconds.items()},
        "times_as_fast_as": {name: ratios(seconds[name], seconds[OURS]).to_json(3) for name in baselines},
        "over_fastest_order_dependent": {"side": fastest} | ratios(seconds[OURS], seconds[fastest]).to_json(3),
        "gflop_per_s": Spread.of([flops / s / 1e9 for s in seconds[OURS]]).to_json(1),
        "stream_gb_per_s": Spread.of([rate / 1e9 for rate in streams]).to_json(2),
        "share_of_stream": Spread.of(shares).to_json(3),
    }


def _theirs(shape: Shape, w_in: Tensor, w_out: Tensor) -> dict[str, Layer]:
    """transformers' experts by each of its implementations for a CPU, over the same weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    layers: dict[str, Layer] = {}
    for name in (GROUPED, BATCHED, EAGER):
        config = Qwen3MoeConfig(
            hidden_size=shape.hidden, moe_intermediate_size=shape.intermediate, num_experts=shape.experts
        )
        config._experts_implementation = name.removeprefix("transformers ")
        with torch.device("meta"):
            experts = Qwen3MoeExperts(config)
        experts.gate_up_proj = torch.nn.Parameter(w_in, requires_grad=False)
        experts.down_proj = torch.nn.Parameter(w_out, requires_grad=False)
        layers[name] = experts
    return layers


def _filled(kernel: CpuKernel, w_in: Tensor, w_out: Tensor) -> CpuKernel:
    for slot in range(kernel.num_slots):
        kernel.write(slot, ExpertWeights(w_in[slot], w_out[slot]))
    return kernel


def _layer(kernel: CpuKernel) -> Layer:
    """With what a router does around a kernel: pairs sorted by expert, and each row's answers weighted and summed."""

    def layer(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        slot_P, order_P = index_TK.flatten().sort()
        y_PH = kernel.run(x_TH, order_P // index_TK.shape[1], slot_P)
        y_TKH = torch.empty_like(y_PH).index_copy_(0, order_P, y_PH).view(*index_TK.shape, -1)
        return torch.bmm(weight_TK.unsqueeze(1), y_TKH).squeeze(1)

    return layer


def _routing(shape: Shape, num_tokens: int, number: int) -> tuple[Tensor, Tensor]:
    """Experts drawn evenly, all of one weight."""
    generator = torch.Generator().manual_seed(1000 * num_tokens + number)
    index_TK = torch.rand(num_tokens, shape.experts, generator=generator).topk(shape.top_k).indices
    return index_TK, torch.full(index_TK.shape, 1 / shape.top_k, dtype=torch.bfloat16)


def _check_alike(sides: Mapping[str, Layer], x_TH: Tensor, routing: tuple[Tensor, Tensor]) -> None:
    """Every side computes the same; and ours gives a row the same bits alone."""
    ours = sides[OURS](x_TH, *routing)
    for layer in sides.values():
        torch.testing.assert_close(layer(x_TH, *routing), ours, rtol=0.05, atol=0.05)
    for row in (0, len(x_TH) - 1):
        alone = sides[OURS](*(tensor[row : row + 1] for tensor in (x_TH, *routing)))
        assert torch.equal(alone[0], ours[row]), "a row's bits depend on its company"


def _noise(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """bfloat16 of such a size that a product over the last dimension is about as large as what is multiplied."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.mul_(scale / shape[-1] ** 0.5).bfloat16()


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def draw(report: dict[str, Any], path: Path) -> None:
    """How many times as fast as each baseline, over the number of tokens, and the share of the stream, by shape."""
    from expertmesh.bench.picture import COLORS, new_figure, save

    figure = new_figure(3.2 * len(report["shapes"]), 5)
    grid = figure.subplots(2, len(report["shapes"]), sharex=True, squeeze=False, height_ratios=(3, 2))
    for of_shape, over, under in zip(report["shapes"], *grid, strict=True):
        shape, points = of_shape["shape"], of_shape["at"]
        for name, color in zip((GROUPED, BATCHED, EAGER, LOOP), itertools.cycle(COLORS), strict=False):
            known = [point for point in points if name in point["times_as_fast_as"]]
            times = [point["times_as_fast_as"][name]["median"] for point in known]
            over.plot([point["tokens"] for point in known], times, color=color, marker="o", markersize=3, label=name)
        over.axhline(1.0, color="black", linewidth=0.8)
        over.set_yscale("log")
        experts = f"{shape['experts']} experts of {shape['intermediate']:,}"
        over.set_title(f"{experts}, hidden {shape['hidden']:,}, top-{shape['top_k']}", fontsize=9)
        counts = [point["tokens"] for point in points]
        under.plot(
            counts, [point["share_of_stream"]["median"] for point in points], color="black", marker="o", markersize=3
        )
        under.set_ylim(0, 1)
        under.set_xscale("log", base=2)
        under.set_xticks(counts, [str(count) for count in counts])
        under.set_xlabel("tokens")
    grid[0][0].set_ylabel("times as fast as")
    grid[1][0].set_ylabel("share of streaming\nread bandwidth")
    grid[0][0].legend(frameon=False, fontsize=8)
    save(figure, path)
