"""`expertmesh bench decode`: tokens per second while 1, 8 and 32 streams are written to.

A router and two host processes, one thread each, against what one would run in their place on the same cores:
transformers' continuous batching, its plain batched loop for orientation, and llama.cpp where it is installed; and
against themselves behind a gateway, as clients see them over HTTP. All have the same weights, prompts and way to draw a
token. The sides are processes of their own and take turns.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from expertmesh.bench import decode_http, decode_llama, decode_sides
from expertmesh.bench.decode_model import SHAPES, prompts, save_checkpoint
from expertmesh.bench.measure import Spread, environment, ratios
from expertmesh.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.connection import Connection

    from expertmesh.bench.decode_sides import DecodeSide

OURS, HTTP, CONTINUOUS, PLAIN, LLAMA = (
    "expertmesh",
    "expertmesh, over HTTP",
    "transformers, continuous batching",
    "transformers, plain loop",
    "llama.cpp",
)
WARM_UP_TOKENS = 4


def run(
    *, shape: str, streams: Sequence[int], rounds: int, tokens: int, report: Callable[[Progress], None]
) -> dict[str, Any]:
    """Let every side write `tokens` tokens to each stream, `rounds` times over: a JSON-able report."""
    sides: dict[str, DecodeSide] = {
        OURS: decode_sides.mesh,
        HTTP: decode_http.over_http,
        CONTINUOUS: decode_sides.continuous_batching,
        PLAIN: decode_sides.plain_batch,
    }
    why_not = decode_llama.why_not()
    if why_not is None:
        sides[LLAMA] = decode_llama.llama_cpp
    else:
        report(Progress(phase=f"without {LLAMA}: {why_not}"))
    with tempfile.TemporaryDirectory(prefix="expertmesh-decode-") as folder:
        report(Progress(phase=f"making the model: {SHAPES[shape].description}"))
        save_checkpoint(SHAPES[shape], Path(folder))
        paces = _alternate(sides, Path(folder), streams, rounds, tokens, report)
    return {
        "bench": "decode",
        "shape": {"name": shape, "model": SHAPES[shape].description, "dtype": "bfloat16"},
        "threads": {
            OURS: f"1 in the router, 1 in each of {decode_sides.NUM_HOSTS} hosts",
            HTTP: "the same, and beside them Ray, Serve, the gateway and the clients",
        }
        | {side: str(decode_sides.NUM_THREADS) for side in sides if side not in (OURS, HTTP)},
        "prompt_tokens": len(prompts(1)[0]),
        "tokens_per_stream": tokens,
        "rounds": rounds,
        "streams": [_compared(num_streams, paces[num_streams]) for num_streams in streams],
        "left_out": {} if why_not is None else {LLAMA: why_not},
        "environment": environment(
            f"expertmesh bench decode --shape {shape} {' '.join(f'--streams {n}' for n in streams)} "
            f"--rounds {rounds} --tokens {tokens} --json"
        ),
    }


def _compared(num_streams: int, paces: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    return {
        "streams": num_streams,
        "tokens_per_second": {side: Spread.of(of).to_json(2) for side, of in paces.items()},
        "ours_over": {side: ratios(paces[OURS], of).to_json(3) for side, of in paces.items() if side != OURS},
    }


def _alternate(
    sides: Mapping[str, DecodeSide],
    folder: Path,
    streams: Sequence[int],
    rounds: int,
    tokens: int,
    report: Callable[[Progress], None],
) -> dict[int, dict[str, list[float]]]:
    """Per number of streams and side, the pace of each round. Within a round all sides come one after the other."""
    paces: dict[int, dict[str, list[float]]] = {num_streams: defaultdict(list) for num_streams in streams}
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, side in sides.items():
            report(Progress(phase=f"starting {name}"))
            processes[name] = _SideProcess(side, folder)
            stack.callback(processes[name].close)
        for num_streams in streams:
            for process in processes.values():
                process.pace(num_streams, WARM_UP_TOKENS)
            for number in range(rounds):
                report(Progress(phase=f"{num_streams} streams", done=number, total=rounds))
                for name, process in processes.items():
                    paces[num_streams][name].append(process.pace(num_streams, tokens))
    return paces


class _SideProcess:
    """One side in a process of its own."""

    def __init__(self, side: DecodeSide, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=_obey, args=(side, folder, theirs))
        self._process.start()
        theirs.close()

    def pace(self, num_streams: int, num_tokens: int) -> float:
        """Decode: tokens per second. Raises EOFError when the side has died."""
        self._orders.send((num_streams, num_tokens))
        tokens_per_second: float = self._orders.recv()
        return tokens_per_second

    def close(self) -> None:
        self._orders.close()
        self._process.join()


def _obey(side: DecodeSide, folder: Path, orders: Connection) -> None:
    """A side's process, until its pipe is closed."""
    transformers.logging.disable_progress_bar()
    with side(folder) as decode, contextlib.suppress(EOFError):
        while True:
            num_streams, num_tokens = orders.recv()
            orders.send(decode(prompts(num_streams), num_tokens))
