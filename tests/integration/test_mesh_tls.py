"""A whole mesh of processes with mutual TLS, from its start to a host's death, through a rotation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expertmesh.authority import Authority
from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.checkpoint.source import resolve
from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.config import MeshConfig, PoolSection
from expertmesh.control.controller import Controller
from expertmesh.errors import ReplicaUnavailableError
from expertmesh.moe.exchange import Exchange
from expertmesh.testing.processes import ProcessCluster
from expertmesh.transport import LayerRequest
from expertmesh.transport.grpc_control import GrpcHostControl
from expertmesh.transport.loop import LoopThread
from expertmesh.transport.network import NetworkTransport

PATIENCE_S = 60.0


def test_a_mesh_starts_serves_renews_its_certificate_and_replaces_a_host_over_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls")
    authority.make()
    authority.issue(30)
    files = authority.files
    index = index_checkpoint(resolve("tiny"), "float32")
    config = MeshConfig(model="tiny", pools=(PoolSection(hosts=2),), experts={"min_replicas": 2})
    loop = LoopThread("controller")
    with ProcessCluster(tls=files) as cluster:

        def connect(host: Any) -> GrpcHostControl:
            return GrpcHostControl(host, cluster.token, tls=files)

        def do(coroutine: Coroutine[Any, Any, Any]) -> Any:
            return loop.run(asyncio.wait_for(coroutine, PATIENCE_S))

        controller = Controller(config, cluster, connect, lambda: index, SYSTEM_CLOCK)
        do(controller.start())
        assert controller.start_up.error is None
        placement = do(controller.wait_placement("router", 0, 10))
        transport = NetworkTransport(cluster.token, local_sockets=False, tls=files)
        with closing(Exchange(transport, placement)) as exchange:
            x = torch.randn(8, index.specs[0].hidden, generator=torch.Generator().manual_seed(7))
            wanted = (torch.arange(8) % 16).unsqueeze(1)
            expected = exchange.run(0, x, wanted)

            authority.issue(30)
            assert torch.equal(exchange.run(0, x, wanted), expected)  # over the streams that it had

            victim = placement.hosts[0].id
            cluster.kill(victim)
            pause = threading.Event()
            for _ in range(int(PATIENCE_S / 0.1)):
                assert torch.equal(exchange.run(0, x, wanted), expected)
                newer = do(controller.wait_placement("router", exchange.placement.epoch, 0.1))
                if newer is not None:
                    exchange.update(newer)
                    if len(newer.hosts) == 2 and victim not in {host.id for host in newer.hosts}:
                        break
                pause.wait(0.05)
            else:
                pytest.fail("the host was not replaced")
            assert torch.equal(exchange.run(0, x, wanted), expected)  # its successor knows the renewed one only

            with closing(NetworkTransport(cluster.token, local_sockets=False)) as outsider:
                rows = LayerRequest(0, "float32", x.view(torch.uint8).numpy(), np.arange(8, dtype=np.int32), [0], [8])
                outsider.send(exchange.placement.hosts[0], rows)
                ((_, answer),) = outsider.receive(20)
                assert isinstance(answer, ReplicaUnavailableError)
        do(controller.stop())
    loop.close()
