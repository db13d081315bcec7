"""The two Ray Serve deployments: thin shells around `Router` and the gateway's app."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError

from expertmesh.config import MeshConfig
from expertmesh.errors import ConfigError, ExpertMeshError, NoControllerError
from expertmesh.serve.router import Router

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

    from fastapi import FastAPI

    from expertmesh.engine.api import GenerateRequest, PromptLogprobs, TokenEvent
    from expertmesh.placement import Placement

logger = logging.getLogger(__name__)

CONTROLLER = "expertmesh-controller"
"""Name of the actor that the router deployment owns."""

_POLL_S = 10.0
"""Well below the time after which the controller takes a silent router to be gone."""


class RouterDeployment:
    """A replica holds one `Router` and follows the controller's placements."""

    async def __init__(self, config: dict[str, Any], token: str) -> None:  # type: ignore[misc]  # Serve awaits it
        self._controller = _Controller()
        placement = await self._first_placement()
        self._router = await asyncio.to_thread(Router, MeshConfig.model_validate(config), placement, token)
        self._follower = asyncio.create_task(self._follow())

    async def _first_placement(self) -> Placement:
        """Wait for the controller's start. Raises ConfigError with what it failed on."""
        while True:
            status = await self._controller.ask("status")
            if status["error"]:
                raise ConfigError(status["error"])
            placement: Placement | None = await self._controller.ask("wait_placement", _router_id(), 0, _POLL_S)
            if placement is not None:
                return placement

    async def _follow(self) -> None:
        while True:
            try:
                await self._controller.ask("status")  # begins the start of one that is new
                epoch = self._router.epoch
                placement = await self._controller.ask("wait_placement", _router_id(), epoch, _POLL_S)
            except (RayActorError, ValueError):
                # The controller is gone; Serve starts another. Until then the last placement stands.
                await asyncio.sleep(1.0)
            else:
                if placement is not None:
                    await asyncio.to_thread(self._router.update, placement)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[TokenEvent]]:
        async for events in self._router.generate(request):
            yield events

    async def score(self, prompt_ids: tuple[int, ...], top_logprobs: int) -> PromptLogprobs:
        return await self._router.score(prompt_ids, top_logprobs)

    async def trace(self, seconds: float) -> AsyncIterator[bytes]:
        async for data in self._router.trace(seconds):
            yield data

    async def mesh(self, what: str) -> Any:
        """What /mesh/WHAT answers: the controller's word."""
        with _controller_away():
            return await self._controller.ask("report", what)

    async def order(self, what: str, values: dict[str, Any]) -> Any:
        """What POST /mesh/WHAT asks the controller for."""
        with _controller_away():
            return await self._controller.ask("order", what, values)

    async def ready(self) -> bool:
        return self._router.healthy

    def check_health(self) -> None:
        """Serve's health check: a dead engine thread ends the replica, and Serve starts another."""
        if not self._router.healthy:
            raise RuntimeError("the engine has died")

    async def __del__(self) -> None:
        """Called by Serve after the replica has drained."""
        self._follower.cancel()
        await asyncio.to_thread(self._router.close)


def _router_id() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)


class _Controller:
    """The way to the controller. To find it asks Ray's control service, which may be busy: once, and off the loop."""

    def __init__(self) -> None:
        self._handle: Any = None

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of it. Raises what that raises; RayActorError or ValueError when there is no controller."""
        known = self._handle
        try:
            if known is not None:
                return await getattr(known, method).remote(*arguments)
        except RayActorError as error:
            if isinstance(error, RayTaskError):
                raise  # it answers, with an error of its own
        self._handle = await asyncio.to_thread(serve.get_deployment_actor, CONTROLLER)
        return await getattr(self._handle, method).remote(*arguments)


@contextlib.contextmanager
def _controller_away() -> Iterator[None]:
    """Say it in our words when there is no controller to ask."""
    try:
        yield
    except (RayActorError, ValueError) as error:
        if isinstance(error, RayTaskError):
            raise  # it answers, with an error of its own
        raise NoControllerError("the mesh's controller cannot be reached now; ask again in a moment") from error


@serve.ingress()
class GatewayDeployment:
    """A replica serves HTTP; all it knows of the mesh is the router deployment's handle."""

    def __init__(self, config: dict[str, Any], router: Any, token: str) -> None:
        self._config = MeshConfig.model_validate(config)
        self._router = router
        self._token = token

    def __serve_build_asgi_app__(self) -> FastAPI:
        from expertmesh.serve.gateway import gateway_app  # imports transformers: only here, in the replica

        return gateway_app(self._config, RouterHandle(self._router), self._token)


class RouterHandle:
    """The gateway's backend over a Serve handle. Our errors come out of it as themselves."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[TokenEvent], None]:
        answer = self._handle.options(stream=True).generate.remote(request)
        try:
            with _own_errors():
                async for events in answer:
                    yield events
        finally:
            answer.cancel()  # does nothing once the answer is complete

    async def score(self, prompt_ids: tuple[int, ...], top_logprobs: int) -> PromptLogprobs:
        with _own_errors():
            result: PromptLogprobs = await self._handle.score.remote(prompt_ids, top_logprobs)
            return result

    async def trace(self, seconds: float) -> AsyncGenerator[bytes, None]:
        answer = self._handle.options(stream=True).trace.remote(seconds)
        try:
            with _own_errors():
                async for data in answer:
                    yield data
        finally:
            answer.cancel()

    async def mesh(self, what: str) -> Any:
        with _own_errors(), _controller_away():
            return await self._handle.mesh.remote(what)

    async def order(self, what: str, values: dict[str, Any]) -> Any:
        with _own_errors(), _controller_away():
            return await self._handle.order.remote(what, values)

    async def healthy(self) -> bool:
        try:
            return bool(await self._handle.ready.remote())
        except ray.exceptions.RayError:
            return False


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Ray wraps what a remote call raised; unwrap what is ours."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, ExpertMeshError):
            raise error.cause from None
        raise
