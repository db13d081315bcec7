"""`expertmesh bench exchange`: what one exchange costs above the bytes that it moves.

32 tokens of 1,024 bfloat16 go to 2 host processes of this machine whose experts only echo: as the product does it, by
local sockets, and over gRPC, as it does between machines. Against a bare held-open gRPC stream that echoes the same
bytes to 2 processes, and against Ray actor calls that do the same.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from expertmesh.bench.bare_stream import BareStreams
from expertmesh.bench.echo_host import CONFIGURATION, HIDDEN
from expertmesh.bench.measure import Spread, alternate, environment, ratios
from expertmesh.hosts.process import HostProcess
from expertmesh.ids import ExpertId, HostId
from expertmesh.moe.exchange import Exchange
from expertmesh.placement import HostInfo, Placement
from expertmesh.transport.network import NetworkTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

NUM_HOSTS = 2
NUM_TOKENS = 32
EXCHANGE, OVER_GRPC, BARE, RAY = "exchange", "exchange over gRPC", "bare gRPC stream", "Ray actor calls"


def run(*, rounds: int = 40, calls: int = 25) -> dict[str, Any]:
    """Measure all sides: a JSON-able report with times in milliseconds."""
    sides = {EXCHANGE: _exchange, OVER_GRPC: _exchange_over_grpc, BARE: _bare, RAY: _ray_actors}
    seconds = alternate(sides, rounds=rounds, calls=calls)
    milliseconds = {name: Spread.of([1e3 * s for s in of]).to_json(4) for name, of in seconds.items()}
    return {
        "bench": "exchange",
        "shape": {"tokens": NUM_TOKENS, "hidden": HIDDEN, "dtype": "bfloat16", "hosts": NUM_HOSTS},
        "rounds": rounds,
        "calls_per_round": calls,
        "milliseconds": milliseconds,
        "exchange_over_bare": ratios(seconds[EXCHANGE], seconds[BARE]).to_json(3),
        "exchange_over_grpc_over_bare": ratios(seconds[OVER_GRPC], seconds[BARE]).to_json(3),
        "ray_over_exchange": ratios(seconds[RAY], seconds[EXCHANGE]).to_json(3),
        "environment": environment("expertmesh bench exchange --json"),
    }


def _rows() -> torch.Tensor:
    return torch.randn(NUM_TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()


def _exchange() -> AbstractContextManager[Callable[[], object]]:
    return _echoed(local_sockets=True)


def _exchange_over_grpc() -> AbstractContextManager[Callable[[], object]]:
    return _echoed(local_sockets=False)


@contextlib.contextmanager
def _echoed(*, local_sockets: bool) -> Iterator[Callable[[], object]]:
    """Token t wants both experts, and each host holds one: every row goes to each host and comes back once."""
    x = _rows()
    token = secrets.token_urlsafe()
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(HostProcess(token, module="expertmesh.bench.echo_host")) for _ in range(NUM_HOSTS)
        ]
        hosts = tuple(
            HostInfo(id=HostId(f"echo-{i}"), address=process.address, socket=process.socket)
            for i, process in enumerate(processes)
        )
        placement = Placement(
            epoch=1,
            hosts=hosts,
            num_experts=CONFIGURATION.layer_experts,
            replicas={ExpertId(0, i): (host.id,) for i, host in enumerate(hosts)},
        )
        exchange = Exchange(NetworkTransport(token, local_sockets=local_sockets), placement)
        stack.callback(exchange.close)
        index = torch.arange(NUM_HOSTS).expand(len(x), NUM_HOSTS).contiguous()
        assert torch.equal(exchange.run(0, x, index), x.unsqueeze(1).expand(-1, NUM_HOSTS, -1))
        yield lambda: exchange.run(0, x, index)


@contextlib.contextmanager
def _bare() -> Iterator[Callable[[], object]]:
    message = _rows().view(torch.uint8).numpy().tobytes()
    command = [sys.executable, "-m", "expertmesh.bench.bare_stream"]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(NUM_HOSTS)
        ]
        addresses = [process.stdout.readline().strip() for process in processes if process.stdout]
        streams = BareStreams(addresses)
        stack.callback(streams.close)
        assert streams.echo(message) == [message] * NUM_HOSTS
        yield lambda: streams.echo(message)


class _Echo:
    def echo(self, rows: np.ndarray) -> np.ndarray:
        return rows


@contextlib.contextmanager
def _ray_actors() -> Iterator[Callable[[], object]]:
    import ray

    ray.init(num_cpus=NUM_HOSTS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        rows = _rows().view(torch.uint8).numpy()
        actors = [ray.remote(_Echo).remote() for _ in range(NUM_HOSTS)]

        def call() -> object:
            return ray.get([actor.echo.remote(rows) for actor in actors])

        assert np.array_equal(call()[0], rows)  # type: ignore[index]
        yield call
    finally:
        ray.shutdown()
