"""`expertmesh bench exchange`: what one exchange costs above the bytes that it moves.

32 tokens of 1,024 bfloat16 go to 2 host processes of this machine whose experts only echo: as the product does it, by
shared memory, and over gRPC, as it does between machines. Against local sockets and a bare held-open gRPC stream that
echo the same bytes to 2 processes, and against Ray actor calls that do the same. Then the same experts are spread over
1 to 4 hosts, for what one host more costs.
"""

from __future__ import annotations

import contextlib
import functools
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
from expertmesh.bench.raw_socket import RawSockets
from expertmesh.hosts.process import HostProcess
from expertmesh.ids import ExpertId, HostId
from expertmesh.moe.exchange import Exchange
from expertmesh.placement import Placement
from expertmesh.transport.network import NetworkTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

NUM_HOSTS = 2
NUM_TOKENS = 32
MOST_HOSTS = CONFIGURATION.layer_experts[0]
"""As many as there are experts."""
EXCHANGE, OVER_GRPC = "exchange", "exchange over gRPC"
RAW, BARE, RAY = "raw local sockets", "bare gRPC stream", "Ray actor calls"


def run(*, rounds: int = 40, calls: int = 25, most_hosts: int = MOST_HOSTS) -> dict[str, Any]:
    """Measure all sides: a JSON-able report with times in milliseconds."""
    seconds = alternate(
        {
            EXCHANGE: functools.partial(_echoed, local_sockets=True),
            OVER_GRPC: functools.partial(_echoed, local_sockets=False),
            RAW: _raw,
            BARE: _bare,
            RAY: _ray_actors,
        },
        rounds=rounds,
        calls=calls,
    )
    return {
        "bench": "exchange",
        "shape": {"tokens": NUM_TOKENS, "hidden": HIDDEN, "dtype": "bfloat16", "hosts": NUM_HOSTS},
        "rounds": rounds,
        "calls_per_round": calls,
        "milliseconds": _milliseconds(seconds),
        "exchange_over_raw": ratios(seconds[EXCHANGE], seconds[RAW]).to_json(3),
        "exchange_over_grpc_over_exchange": ratios(seconds[OVER_GRPC], seconds[EXCHANGE]).to_json(3),
        "exchange_over_grpc_over_bare": ratios(seconds[OVER_GRPC], seconds[BARE]).to_json(3),
        "ray_over_exchange_over_grpc": ratios(seconds[RAY], seconds[OVER_GRPC]).to_json(3),
        "ray_over_exchange": ratios(seconds[RAY], seconds[EXCHANGE]).to_json(3),
        "by_hosts": _by_hosts(rounds, calls, most_hosts, local_sockets=True),
        "by_hosts_over_grpc": _by_hosts(rounds, calls, most_hosts, local_sockets=False),
        "environment": environment(f"expertmesh bench exchange --rounds {rounds} --most-hosts {most_hosts} --json"),
    }


def _by_hosts(rounds: int, calls: int, most_hosts: int, *, local_sockets: bool) -> dict[str, Any]:
    """Every token wants every expert, and ever more hosts share them: what each after the first adds, as a share of the
    time with one."""
    sides = {
        str(n): functools.partial(_echoed, n, MOST_HOSTS, local_sockets=local_sockets) for n in range(1, most_hosts + 1)
    }
    seconds = alternate(sides, rounds=rounds, calls=calls)
    added = [
        [(many - one) / (n - 1) / one for many, one in zip(seconds[str(n)], seconds["1"], strict=True)]
        for n in range(2, most_hosts + 1)
    ]
    return {
        "milliseconds": _milliseconds(seconds),
        "each_further_host": {str(n): Spread.of(of).to_json(3) for n, of in enumerate(added, 2)},
    }


def _milliseconds(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    return {name: Spread.of([1e3 * s for s in of]).to_json(4) for name, of in seconds.items()}


def _rows() -> torch.Tensor:
    return torch.randn(NUM_TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()


@contextlib.contextmanager
def _echoed(
    num_hosts: int = NUM_HOSTS, num_choices: int = NUM_HOSTS, *, local_sockets: bool
) -> Iterator[Callable[[], object]]:
    """Token t wants the first `num_choices` experts, which the hosts share: its row goes to each host once."""
    x = _rows()
    token = secrets.token_urlsafe()
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(HostProcess(token, module="expertmesh.bench.echo_host")) for _ in range(num_hosts)
        ]
        hosts = tuple(process.info(HostId(f"echo-{i}")) for i, process in enumerate(processes))
        placement = Placement(
            epoch=1,
            hosts=hosts,
            num_experts=CONFIGURATION.layer_experts,
            replicas={ExpertId(0, i): (hosts[i % num_hosts].id,) for i in range(num_choices)},
        )
        exchange = Exchange(NetworkTransport(token, local_sockets=local_sockets), placement)
        stack.callback(exchange.close)
        index = torch.arange(num_choices).expand(len(x), num_choices).contiguous()
        assert torch.equal(exchange.run(0, x, index), x.unsqueeze(1).expand(-1, num_choices, -1))
        yield lambda: exchange.run(0, x, index)


@contextlib.contextmanager
def _bare() -> Iterator[Callable[[], object]]:
    message = _rows().view(torch.uint8).numpy().tobytes()
    with contextlib.ExitStack() as stack:
        streams = BareStreams(_echo_processes(stack, "expertmesh.bench.bare_stream"))
        stack.callback(streams.close)
        assert streams.echo(message) == [message] * NUM_HOSTS
        yield lambda: streams.echo(message)


@contextlib.contextmanager
def _raw() -> Iterator[Callable[[], object]]:
    message = _rows().view(torch.uint8).numpy().tobytes()
    with contextlib.ExitStack() as stack:
        sockets = RawSockets(_echo_processes(stack, "expertmesh.bench.raw_socket", str(len(message))), len(message))
        stack.callback(sockets.close)
        assert sockets.echo(message) == message
        yield lambda: sockets.echo(message)


def _echo_processes(stack: contextlib.ExitStack, module: str, *arguments: str) -> list[str]:
    """Run a baseline's module in as many processes as there are hosts: where each can be reached."""
    command = [sys.executable, "-m", module, *arguments]
    processes = [
        stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        for _ in range(NUM_HOSTS)
    ]
    return [process.stdout.readline().strip() for process in processes if process.stdout]


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
