"""The two Ray Serve deployments: thin shells around `Router` and the gateway's app."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import uuid
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from expertmesh.config import MeshConfig
from expertmesh.doubt import Doubt
from expertmesh.errors import ConfigError, ExpertMeshError, NoControllerError, NoRouterError, RouterGoneError
from expertmesh.fault import NOT_ALLOWED
from expertmesh.serve.relay import Inbox
from expertmesh.serve.router import Router
from expertmesh.signals import kill_soon

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

    from fastapi import FastAPI

    from expertmesh.engine.api import GenerateRequest, PromptLogprobs, TokenEvent
    from expertmesh.gates.spec import GateSpec
    from expertmesh.placement import Placement
    from expertmesh.serve.relay import Incoming, Message

logger = logging.getLogger(__name__)

CONTROLLER = "expertmesh-controller"
"""Name of the actor that the router deployment owns."""

_READY_S = 2.0
"""A router that is there says so in less."""
_POLL_S = 10.0
"""Well below the time after which the controller takes a silent router to be gone."""
_TELL_EVERY_S = 1.0
"""How old what the controller shows of a router may be."""


class RouterDeployment:
    """A replica holds one `Router` and follows the controller's placements."""

    async def __init__(self, config: dict[str, Any], token: str) -> None:  # type: ignore[misc]  # Serve awaits it
        self._may_be_broken = bool(config.get("faults"))
        self._controller = _Controller()
        placement = await self._first_placement()
        self._router = await asyncio.to_thread(Router, MeshConfig.model_validate(config), placement, token)
        work = (self._follow(), self._tell_doubts(), self._tell_statistics())
        self._tasks = [asyncio.create_task(coroutine) for coroutine in work]
        self._is_draining = False
        threading.Thread(target=self._end_with_engine, name="router-end", daemon=True).start()

    def _end_with_engine(self) -> None:
        """Without its engine a router ends at once: a process that is gone gets no requests, and is replaced."""
        self._router.wait_end()
        if not self._is_draining:
            logger.error("the engine has died; the router ends with it")
            os._exit(1)

    async def _first_placement(self) -> Placement:
        """Wait for the controller's start. Raises ConfigError with what it failed on."""
        while True:
            try:
                with _controller_away():
                    status = await self._controller.ask("status")
                    if status["error"]:
                        raise ConfigError(status["error"])
                    placement: Placement | None = await self._controller.ask("wait_placement", _router_id(), 0, _POLL_S)
            except NoControllerError:
                await asyncio.sleep(1.0)
                continue
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

    async def _tell_doubts(self) -> None:
        """Pass every doubt about a replica on to the controller, those that came together only once."""
        loop, doubts, news = asyncio.get_running_loop(), set[Doubt](), asyncio.Event()

        def hear(doubt: Doubt) -> None:
            doubts.add(doubt)
            news.set()

        self._router.on_doubt(lambda doubt: loop.call_soon_threadsafe(hear, doubt))
        while True:
            await news.wait()
            told = tuple(doubts)
            doubts.clear()
            news.clear()
            # Without a controller nobody can act on them; what is still wrong then will be doubted again.
            await self._tell("suspect", told)

    async def _tell_statistics(self) -> None:
        """Tell the controller how it goes, for those who look at the mesh."""
        while True:
            await self._tell("hear_router", self._router.statistics())  # without a controller nobody looks
            await asyncio.sleep(_TELL_EVERY_S)

    async def _tell(self, method: str, news: Any) -> None:
        """Tell the controller, if there is one."""
        with contextlib.suppress(RayActorError, ValueError):
            await self._controller.ask(method, _router_id(), news)

    async def generate(self, request: GenerateRequest, gateway: str) -> AsyncIterator[Message]:
        async for message in self._router.generate(request, gateway):
            yield message

    async def score(
        self, prompt_ids: tuple[int, ...], top_logprobs: int, gate: GateSpec | None = None
    ) -> PromptLogprobs:
        return await self._router.score(prompt_ids, top_logprobs, gate)

    async def trace(self, seconds: float) -> AsyncIterator[bytes]:
        async for data in self._router.trace(seconds):
            yield data

    async def mesh(self, what: str) -> Any:
        """What /mesh/WHAT answers: the controller's word."""
        with _controller_away():
            return await self._controller.ask("report", what)

    async def order(self, what: str, values: dict[str, Any]) -> Any:
        """What POST /mesh/WHAT asks the controller for; or this router, for its own end."""
        if what == "fault" and values["target"] == "router":
            return self._break()
        with _controller_away():
            return await self._controller.ask("order", what, values)

    def _break(self) -> dict[str, Any]:
        """Be killed, if that is allowed."""
        if not self._may_be_broken:
            raise ConfigError(NOT_ALLOWED)
        kill_soon()
        return {"accepted": True, "process_id": os.getpid()}

    async def ready(self) -> bool:
        return self._router.healthy

    async def __del__(self) -> None:
        """Called by Serve after the replica has drained."""
        self._is_draining = True
        for task in self._tasks:
            task.cancel()
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
        self._id = uuid.uuid4().hex
        self._inbox = Inbox()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[TokenEvent], None]:
        incoming = self._inbox.expect(request.request_id)
        reading = asyncio.create_task(self._read(request, incoming))
        try:
            while (events := await incoming.next()) is not None:
                yield events
        finally:
            reading.cancel()
            self._inbox.forget(request.request_id)

    async def _read(self, request: GenerateRequest, incoming: Incoming) -> None:
        """Take an answer's messages, which may be for other requests too, until its end."""
        answer = self._handle.options(stream=True).generate.remote(request, self._id)
        try:
            with _own_errors():
                async for message in answer:
                    self._inbox.put(message)
                    incoming.beat()
        except Exception as error:  # noqa: BLE001 - it is the request's, and raised there
            incoming.end(error)
        else:
            incoming.end(None)
        finally:
            answer.cancel()  # does nothing once the answer is complete

    async def score(
        self, prompt_ids: tuple[int, ...], top_logprobs: int, gate: GateSpec | None = None
    ) -> PromptLogprobs:
        with _own_errors():
            result: PromptLogprobs = await self._handle.score.remote(prompt_ids, top_logprobs, gate)
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
        with _own_errors():
            return await self._handle.mesh.remote(what)

    async def order(self, what: str, values: dict[str, Any]) -> Any:
        with _own_errors():
            return await self._handle.order.remote(what, values)

    async def healthy(self) -> bool:
        try:
            async with asyncio.timeout(_READY_S):
                return bool(await self._handle.ready.remote())
        except (TimeoutError, RayError, RayServeException):
            return False


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Say in our words what went wrong with a call: Ray wraps what a router raised, and has words of its own for a
    router, or its machine, that is no more."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, ExpertMeshError):
            raise error.cause from None
        raise
    except DeploymentUnavailableError as error:
        raise NoRouterError(f"no router could be started: {error.message}") from error
    except (RayError, RayServeException) as error:
        first_line = str(error).partition("\n")[0]
        raise RouterGoneError(f"{type(error).__name__}: {first_line}") from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RouterGoneError("the router cancelled its work") from None  # Serve says it like this
