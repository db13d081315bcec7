"""Runs the experts of an indexed checkpoint in host processes, over gRPC, placed by the production controller."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from expertmesh.backbone import MoeLayerFn
from expertmesh.checkpoint.recipe import CheckpointIndex
from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.config import MeshConfig, PoolSection
from expertmesh.control.controller import Controller
from expertmesh.moe.exchange import Exchange
from expertmesh.moe.layer import MoeLayer
from expertmesh.placement import Placement
from expertmesh.testing.processes import ProcessCluster
from expertmesh.transport.grpc_control import GrpcHostControl
from expertmesh.transport.network import NetworkTransport


class HostExecutor:
    """Every expert on one of a cluster's hosts."""

    def __init__(self, cluster: ProcessCluster) -> None:
        self._cluster = cluster

    @contextmanager
    def run(self, index: CheckpointIndex) -> Iterator[list[MoeLayerFn]]:
        """The layers' callables, usable until the context ends."""
        exchange = Exchange(NetworkTransport(self._cluster.token), asyncio.run(self._place(index)))
        try:
            yield [MoeLayer(exchange, layer) for layer in range(index.num_layers)]
        finally:
            exchange.close()

    async def _place(self, index: CheckpointIndex) -> Placement:
        controller = Controller(
            MeshConfig(model=index.root, pools=(PoolSection(hosts=self._cluster.num_hosts),)),
            self._cluster,
            lambda host: GrpcHostControl(host, self._cluster.token),
            lambda: index,
            SYSTEM_CLOCK,
        )
        try:
            await controller.start()
            assert controller.start_up.error is None, controller.start_up.error
            placement = await controller.wait_placement("test", newer_than=0, timeout_s=0)
            assert placement is not None
            return placement
        finally:
            await controller.stop()
