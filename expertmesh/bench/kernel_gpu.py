"""What a GPU makes of the expert FFN: our kernels beside what one would run instead, at the shapes of real models.

Every side gets the same tokens, experts and weights, on the device. Where a CUDA graph can hold a side, it is replayed,
so that no side pays for Python; each replay meets another routing, so that no side finds its experts in the cache.

Knows torch and triton; transformers where it is installed; nothing of Ray. `python -m expertmesh.bench.kernel_gpu`
writes the report to standard output.

Shapes: T tokens, K experts per token, E experts, P = TK pairs, H hidden, I intermediate.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch.nn import functional as F

from expertmesh.bench.measure import Spread
from expertmesh.errors import ConfigError
from expertmesh.kernels import tuning
from expertmesh.kernels.formats import FORMATS
from expertmesh.kernels.spec import Activation, ExpertSpec
from expertmesh.kernels.triton_tiles import choose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from expertmesh.kernels.triton_kernel import TritonKernel

TOKEN_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

ROUTINGS = 4
"""Routings that take turns: enough that even one token's experts have left the cache when their turn comes again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The experts of one layer of a model."""

    num_experts: int
    top_k: int
    hidden: int
    intermediate: int

    def spec(self, dtype: str, weight_format: str = "dense") -> ExpertSpec:
        return ExpertSpec(
            hidden=self.hidden,
            intermediate=self.intermediate,
            activation=Activation(name="silu"),
            dtype=dtype,
            weight_format=weight_format,
        )


SHAPES = {
    "mixtral": Shape(num_experts=8, top_k=2, hidden=4096, intermediate=14336),
    "qwen3-30b": Shape(num_experts=128, top_k=8, hidden=2048, intermediate=768),
    "deepseek-v3": Shape(num_experts=256, top_k=8, hidden=7168, intermediate=2048),
}


@dataclass(frozen=True, slots=True)
class Routing:
    """Some tokens, the experts they go to and their weights, on the device; and how many pairs each expert has."""

    x_TH: Tensor
    expert_TK: Tensor
    weight_TK: Tensor
    pairs_E: list[int]

    @property
    def num_active(self) -> int:
        return sum(count > 0 for count in self.pairs_E)

    def head(self, num_tokens: int) -> Routing:
        expert_TK = self.expert_TK[:num_tokens]
        pairs_E = torch.bincount(expert_TK.flatten(), minlength=len(self.pairs_E)).tolist()
        return Routing(self.x_TH[:num_tokens], expert_TK, self.weight_TK[:num_tokens], pairs_E)


Side = Callable[[Routing], Callable[[], "Tensor"]]
"""Makes what is timed for one routing. What it allocates, it does before."""


def random_routing(shape: Shape, num_tokens: int, dtype: str, device: str, seed: int) -> Routing:
    """Tokens that choose their experts at random, all experts alike."""
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(num_tokens, shape.num_experts, generator=generator)
    weight_TK, expert_TK = scores_TE.topk(shape.top_k)
    x_TH = torch.randn(num_tokens, shape.hidden, generator=generator)
    element = getattr(torch, dtype)
    routing = Routing(
        x_TH.to(device, element), expert_TK.to(device), weight_TK.to(device, element), [0] * shape.num_experts
    )
    return routing.head(num_tokens)


def sides(kernel: TritonKernel) -> dict[str, Side]:
    """Everything that is compared. `kernel`'s weights serve all, and where they are quantized it is alone: what others
    need of the same weights is not the same. Those named products leave out the way to and from rows grouped by
    expert; the others go from tokens to their weighted sum."""
    w_in, w_out = kernel.slabs["w_in"], kernel.slabs["w_out"]
    found: dict[str, Side] = {
        "expertmesh": functools.partial(_ours, kernel),
        "expertmesh products": functools.partial(_our_products, kernel),
    }
    if not kernel.spec.format.is_dense:
        return found
    found |= {
        "torch grouped_mm products": functools.partial(_torch_grouped, w_in, w_out),
        "cuBLAS loop products": functools.partial(_loop, w_in, w_out),
    }
    if importlib.util.find_spec("transformers"):
        for name in ("grouped_mm", "batched_mm"):
            found[f"transformers {name}"] = functools.partial(_transformers, w_in, w_out, name)
    return found


def _ours(kernel: TritonKernel, routing: Routing) -> Callable[[], Tensor]:
    num_tokens, top_k = routing.expert_TK.shape
    row_P = torch.arange(num_tokens, device=routing.x_TH.device).repeat_interleave(top_k)
    slot_P = routing.expert_TK.flatten()

    def call() -> Tensor:
        y_PH = kernel.run_on_device(routing.x_TH, row_P, slot_P)
        return (y_PH.view(num_tokens, top_k, -1) * routing.weight_TK[:, :, None]).sum(1)

    return call


def _our_products(kernel: TritonKernel, routing: Routing) -> Callable[[], Tensor]:
    tiling = choose(kernel.tilings, routing.expert_TK.numel() / kernel.num_slots)
    slot_P, order_P = torch.sort(routing.expert_TK.flatten())
    slot_P, row_P = slot_P.to(torch.int32), (order_P // routing.expert_TK.shape[1]).to(torch.int32)
    index = kernel.index(tiling, slot_P)
    return lambda: kernel.products(tiling, routing.x_TH, row_P, slot_P, index)[1]


def _grouped_rows(routing: Routing) -> Tensor:
    order_P = torch.sort(routing.expert_TK.flatten()).indices
    return routing.x_TH[order_P // routing.expert_TK.shape[1]]


def _torch_grouped(w_in: Tensor, w_out: Tensor, routing: Routing) -> Callable[[], Tensor]:
    x_PH = _grouped_rows(routing)
    ends_E = torch.tensor(routing.pairs_E, device=x_PH.device).cumsum(0).to(torch.int32)
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm

    def call() -> Tensor:
        h = grouped_mm(x_PH, w_in.transpose(1, 2), offs=ends_E)
        gate, up = h.chunk(2, dim=-1)
        y: Tensor = grouped_mm(F.silu(gate) * up, w_out.transpose(1, 2), offs=ends_E)
        return y

    return call


def _loop(w_in: Tensor, w_out: Tensor, routing: Routing) -> Callable[[], Tensor]:
    x_PH = _grouped_rows(routing)

    def call() -> Tensor:
        parts = []
        for expert, x in enumerate(torch.split(x_PH, routing.pairs_E)):
            if len(x) > 0:
                gate, up = F.linear(x, w_in[expert]).chunk(2, dim=-1)
                parts.append(F.linear(F.silu(gate) * up, w_out[expert]))
        return torch.cat(parts)

    return call


def _transformers(w_in: Tensor, w_out: Tensor, name: str, routing: Routing) -> Callable[[], Tensor]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    num_experts, hidden, intermediate = w_out.shape
    config = MixtralConfig(num_local_experts=num_experts, hidden_size=hidden, intermediate_size=intermediate)
    config._experts_implementation = name
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(w_in, requires_grad=False)
    experts.down_proj = torch.nn.Parameter(w_out, requires_grad=False)
    if name == "batched_mm":
        copied = routing.expert_TK.numel() * (w_in[0].nbytes + w_out[0].nbytes)
        if w_in.is_cuda and copied > torch.cuda.mem_get_info(w_in.device)[0] / (4 * ROUTINGS):
            raise NotWorthTiming("it copies the weights of every pair, which do not fit")
    return lambda: experts(routing.x_TH, routing.expert_TK, routing.weight_TK)


class NotWorthTiming(Exception):
    """A side cannot or need not run at this size, and says why."""


class _Timed:
    """One side at one size, ready to be timed: a graph per routing, or plain calls where a graph cannot hold it."""

    def __init__(self, side: Side, routings: Sequence[Routing]) -> None:
        calls = [side(routing) for routing in routings]
        for call in calls:
            call()
        torch.cuda.synchronize()
        try:
            self._calls: list[Callable[[], object]] = [_graph(call).replay for call in calls]
            self.in_graph = True
        except RuntimeError:  # it asks the host something, which a capture forbids
            torch.cuda.synchronize()
            self._calls = list(calls)
            self.in_graph = False

    def seconds(self) -> float:
        """Of one call: the mean over the routings, one after another."""

        def every_call() -> None:
            for call in self._calls:
                call()

        return _seconds(every_call) / len(self._calls)


def _graph(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def figures(
    seconds: float, routings: Sequence[Routing], spec: ExpertSpec, ceilings: dict[str, float]
) -> dict[str, float]:
    """What a time means: arithmetic and active experts' bytes per second, and as shares of the device's ceilings.

    `share_of_roofline` is the least time that the ceilings allow, over the time taken.
    """
    num_pairs = routings[0].expert_TK.numel()
    flops = 2 * num_pairs * spec.num_parameters
    num_bytes = statistics.mean(routing.num_active for routing in routings) * spec.num_bytes
    dense, copy = ceilings["dense_tflops"] * 1e12, ceilings["copy_gbps"] * 1e9
    return {
        "tflops": flops / seconds / 1e12,
        "active_gbps": num_bytes / seconds / 1e9,
        "share_of_dense": flops / seconds / dense,
        "share_of_copy": num_bytes / seconds / copy,
        "share_of_roofline": max(flops / dense, num_bytes / copy) / seconds,
    }


def measure_ceilings(dtype: str) -> dict[str, float]:
    """A dense product of 8,192 cubed on random data, and a copy of 4 GiB, bytes read and written."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return {
        "dense_tflops": 2 * size**3 / _median_seconds(lambda: a @ b) / 1e12,
        "copy_gbps": 2 * source.nbytes / _median_seconds(lambda: target.copy_(source)) / 1e9,
    }


def _median_seconds(call: Callable[[], object], rounds: int = 10) -> float:
    return statistics.median([_seconds(call) for _ in range(rounds + 3)][3:])


def _seconds(call: Callable[[], object]) -> float:
    """Of what `call` gives the device to do."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    stop.record()
    stop.synchronize()
    milliseconds: float = start.elapsed_time(stop)
    return milliseconds / 1e3


def run(
    *,
    shapes: Sequence[str] = tuple(SHAPES),
    token_counts: Sequence[int] = TOKEN_COUNTS,
    dtype: str = "bfloat16",
    weight_format: str = "dense",
    rounds: int = 10,
    tuned: bool = False,
) -> dict[str, Any]:
    """Measure every side at every size on the current CUDA device; `tuned` looks for the fastest tilings first."""
    if not torch.cuda.is_available():
        raise ConfigError("this bench needs a GPU, and torch finds none here")
    unknown = set(shapes) - set(SHAPES)
    if unknown:
        raise ConfigError(f"unknown shapes {sorted(unknown)}: choose from {sorted(SHAPES)}")
    ceilings = measure_ceilings(dtype)
    torch.cuda.empty_cache()
    return {
        "device": _device(),
        "dtype": dtype,
        "weight_format": weight_format,
        "ceilings": ceilings,
        "shapes": {
            name: _measure_shape(
                SHAPES[name], SHAPES[name].spec(dtype, weight_format), token_counts, rounds, ceilings, tuned=tuned
            )
            for name in shapes
        },
    }


@torch.no_grad()
def _measure_shape(
    shape: Shape,
    spec: ExpertSpec,
    token_counts: Sequence[int],
    rounds: int,
    ceilings: dict[str, float],
    *,
    tuned: bool,
) -> dict[str, Any]:
    from expertmesh.kernels.triton_kernel import TritonKernel

    kernel = TritonKernel(spec, shape.num_experts, "cuda")
    if tuned:
        kernel.tilings = tuning.tune(kernel, tuning.uniform_loads(shape.num_experts, shape.top_k, token_counts))
    _fill(kernel)
    report: dict[str, Any] = {
        "shape": asdict(shape),
        "tilings": [asdict(tiling) for tiling in kernel.tilings],
        "rows_are_bit_equal": rows_are_bit_equal(kernel, shape, token_counts),
        "tokens": {},
    }
    for num_tokens in token_counts:
        routings = [random_routing(shape, num_tokens, spec.dtype, "cuda", seed) for seed in range(ROUTINGS)]
        report["tokens"][num_tokens] = _measure_size(sides(kernel), routings, spec, rounds, ceilings)
        torch.cuda.empty_cache()
    return report


def _fill(kernel: TritonKernel) -> None:
    """Random weights of a scale that leaves rows about as large as they were; where they are quantized, random codes.

    A float8's code is less than 64, so that none is a NaN."""
    for name, slab in kernel.slabs.items():
        std = kernel.spec.shapes[f"w_{name[2:]}"][-1] ** -0.5
        if slab.dtype == torch.int8:
            slab.random_(-127, 128)
        elif slab.dtype == torch.uint8:
            slab.random_(0, 256 if kernel.spec.format.code == "int4" else 64)
        elif name.startswith("s_"):
            slab.fill_(std / _RMS[kernel.spec.format.code])
        else:
            slab.normal_(std=std)


_RMS = {"int8": 73.6, "int4": 4.64, "fp8": 0.598}
"""Of codes that are drawn so."""


def _measure_size(
    sides: dict[str, Side], routings: Sequence[Routing], spec: ExpertSpec, rounds: int, ceilings: dict[str, float]
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "active_experts": statistics.mean(routing.num_active for routing in routings),
        "sides": {},
    }
    ready: dict[str, _Timed] = {}
    for name, side in sides.items():
        try:
            ready[name] = _Timed(side, routings)
        except (NotWorthTiming, torch.OutOfMemoryError) as reason:
            report["sides"][name] = {"left_out": str(reason).partition("\n")[0]}
            torch.cuda.empty_cache()
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds + 1):  # side after side in each round, so that a slow moment falls on all
        for name, timed in ready.items():
            samples[name].append(timed.seconds())
    for name, timed in ready.items():
        spread = Spread.of(samples[name][1:])
        report["sides"][name] = {
            "seconds": spread.to_json(9),
            "in_graph": timed.in_graph,
            **figures(spread.median, routings, spec, ceilings),
        }
    return report


def rows_are_bit_equal(kernel: TritonKernel, shape: Shape, token_counts: Sequence[int]) -> bool:
    """Whether the first tokens' rows are the same bits among few tokens and among the most."""
    device = str(kernel.device)
    whole = random_routing(shape, max(token_counts), kernel.spec.dtype, device, seed=ROUTINGS)
    y_TH = _ours(kernel, whole)()
    return all(torch.equal(_ours(kernel, whole.head(count))(), y_TH[:count]) for count in token_counts)


def _device() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "processors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m expertmesh.bench.kernel_gpu", description=run.__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKEN_COUNTS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--format", default="dense", choices=FORMATS, help="how weights are stored")
    parser.add_argument("--tuned", action="store_true")
    arguments = parser.parse_args()
    report = run(
        shapes=arguments.shapes,
        token_counts=arguments.tokens,
        weight_format=arguments.format,
        rounds=arguments.rounds,
        tuned=arguments.tuned,
    )
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
