"""One session of training: hosts filled from one checkpoint, and the numbers by which nothing is counted twice.

Knows neither torch's autograd nor how a checkpoint's folder is made. Invariant: a session that has lost a host does
nothing any more but to say so.

Shapes: T tokens, K experts per token, P pairs, H hidden.
"""

from __future__ import annotations

import asyncio
import secrets
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.errors import (
    CheckpointError,
    ConfigError,
    DeadlineExceededError,
    NoReadyReplicaError,
    OutOfSlotsError,
    ProtocolError,
    ReplicaFailedError,
    ReplicaUnavailableError,
    TrainingLostError,
    one_line,
)
from expertmesh.hosts.configuration import configuration_for
from expertmesh.ids import HostId
from expertmesh.moe.dispatch import make_dispatch_plan
from expertmesh.moe.exchange import Exchange, ExchangeLimits
from expertmesh.moe.layer import combine
from expertmesh.placement import HostInfo, Placement
from expertmesh.transport import LayerRequest
from expertmesh.transport.grpc_training import GrpcTraining

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
    from typing import Any

    from expertmesh.checkpoint.recipe import CheckpointIndex, ExpertRecipe
    from expertmesh.ids import ExpertId
    from expertmesh.moe.dispatch import HostPart
    from expertmesh.optimizer import Optimizer
    from expertmesh.tls import TlsFiles
    from expertmesh.transport.network import NetworkTransport

    Assignment = Mapping[ExpertId, Sequence[str]]

T = TypeVar("T")

_RETRY_S = 0.1
_TRIES = 20
"""How often a host is asked where nobody listens: counted, for a machine that was paused has heard nobody either."""
_CONNECT_S = 5.0


class Session:
    """From its making to `close`. Everything waits for hosts; TrainingLostError says that one is lost."""

    def __init__(
        self,
        transport: NetworkTransport,
        index: CheckpointIndex,
        step: int,
        hosts: Sequence[str],
        held: Assignment | None,
        optimizer: Optimizer,
        *,
        token: str,
        tls: TlsFiles | None,
        timeout_s: float,
    ) -> None:
        """Fill `hosts` from what `index` is of, and begin at `step`. `held`: the address for each expert, or None.

        Raises ConfigError, CheckpointError, OutOfSlotsError or TrainingLostError.
        """
        if not hosts or len(set(hosts)) != len(hosts):
            raise ConfigError("hosts: give the address of each host, once, and one at least")
        for address in hosts:
            if not address.rpartition(":")[2].isdecimal():
                raise ConfigError(f"hosts: {one_line(address, 60)!r} is no address; write it as host:port")
        self.id = secrets.randbelow(2**64 - 1) + 1
        self.step = step
        self._transport = transport
        self._index = index
        self._optimizer = optimizer
        self._timeout_s = timeout_s
        self._lost: TrainingLostError | None = None
        self._hosts = {address: HostInfo(id=HostId(address), address=address) for address in hosts}
        self._parts = dict.fromkeys(self._hosts, 0)
        """For each host, how many parts of the gradients it was sent since the last step."""
        self._controls: dict[str, GrpcTraining] = {}
        self._transport.run(self._connect(token, tls))
        try:
            self.placement = self._transport.run(self._fill(held))
            limits = ExchangeLimits(timeout_s=timeout_s, attempt_timeout_s=timeout_s, retry_s=_RETRY_S, retries=_TRIES)
            self._exchange = Exchange(transport, self.placement, limits)
        except BaseException:
            self.close()
            raise

    async def _connect(self, token: str, tls: TlsFiles | None) -> None:
        self._controls = {address: GrpcTraining(info, token, tls=tls) for address, info in self._hosts.items()}

    # --- filling -----------------------------------------------------------------------------------------------------

    async def _fill(self, held: Assignment | None) -> Placement:
        configuration = configuration_for(self._index, self._index.root)
        slots = await self._tell_all(lambda host, _: host.configure(configuration))
        holder = self._dealt({address: sum(of) for address, of in slots.items()}) if held is None else self._only(held)

        await _all(self._fill_host(address, holder) for address in self._hosts)
        # A host that there was no expert for has no part in what follows.
        self._hosts = {address: info for address, info in self._hosts.items() if address in holder.values()}
        return Placement(
            epoch=1,
            hosts=tuple(self._hosts.values()),
            num_experts=self._index.num_experts,
            replicas={expert: (self._hosts[address].id,) for expert, address in holder.items()},
        )

    async def _fill_host(self, address: str, holder: Mapping[ExpertId, str]) -> None:
        mine = [expert for expert, of in holder.items() if of == address]
        for expert in mine:
            await self._tell(address, partial(_load, expert=expert, recipe=self._index.recipes[expert]))
        if mine:
            await self._tell(
                address, lambda host: host.begin(self.id, self.step, self._optimizer, timeout_s=self._timeout_s)
            )

    def _dealt(self, room: dict[str, int]) -> dict[ExpertId, str]:
        """Each expert to the host that has most room left. Where an expert is makes no difference to what it learns."""
        experts = sorted(self._index.recipes)
        if sum(room.values()) < len(experts):
            raise ConfigError(
                f"hosts: they have room for {sum(room.values())} of {len(experts)} experts; use more of them, or larger"
            )
        holder = {}
        for expert in experts:
            address = max(room, key=lambda address: room[address])
            room[address] -= 1
            holder[expert] = address
        return holder

    def _only(self, held: Assignment) -> dict[ExpertId, str]:
        """The one host of each expert. Raises ConfigError."""
        for expert in sorted(self._index.recipes):
            addresses = held.get(expert, ())
            if len(addresses) != 1:
                raise ConfigError(
                    f"placement: expert {expert} has {len(addresses)} replicas, and to be trained it must have one, "
                    "where its gradients are summed: name one host for it"
                )
            if addresses[0] not in self._hosts:
                raise ConfigError(f"placement: expert {expert} is at {addresses[0]}, which is not among hosts")
        if unknown := held.keys() - self._index.recipes.keys():
            raise ConfigError(f"placement: there is no expert {min(unknown)}")
        return {expert: addresses[0] for expert, addresses in held.items()}

    # --- training ----------------------------------------------------------------------------------------------------

    def forward(self, layer: int, x_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        """rows_TKH, all on CPU."""
        self._check()
        deadline = SYSTEM_CLOCK.monotonic() + self._timeout_s
        while True:
            try:
                return self._exchange.run(layer, x_TH, index_TK)
            except (DeadlineExceededError, NoReadyReplicaError, ReplicaFailedError) as error:
                is_early = isinstance(error, NoReadyReplicaError) and SYSTEM_CLOCK.monotonic() < deadline
                if not (is_early and self._transport.run(self._all_listen())):
                    raise self._lose(error) from error

    def backward(self, layer: int, x_TH: torch.Tensor, index_TK: torch.Tensor, grad_TKH: torch.Tensor) -> torch.Tensor:
        """Have the gradients added up that lead from the loss to the experts: x_grad_TH. All on CPU, of x's dtype."""
        self._check()
        num_tokens, num_choices = index_TK.shape
        if num_tokens == 0:
            return torch.zeros_like(x_TH)
        expert_P = index_TK.reshape(-1).numpy()
        grad_PH = grad_TKH.reshape(len(expert_P), -1)
        x_TB = x_TH.contiguous().view(torch.uint8).numpy()
        plan = make_dispatch_plan(self.placement, layer, expert_P, num_choices, np.arange(len(expert_P)))
        dtype = self._index.specs[layer].dtype

        async def ask(part: HostPart) -> torch.Tensor:
            address = part.host.address
            request = LayerRequest(layer, dtype, x_TB[part.tokens], part.pair_rows, part.experts, part.counts)
            number = self._parts[address]
            self._parts[address] += 1  # whatever becomes of it: no other part may have its number
            return await self._tell(
                address,
                lambda host: host.backward(
                    self.id, self.step, number, request, grad_PH[part.pairs], timeout_s=self._timeout_s
                ),
            )

        x_grad_PH = torch.empty_like(grad_PH)
        for part, rows in zip(plan, self._run(_all(ask(part) for part in plan)), strict=True):
            x_grad_PH[part.pairs] = rows
        return combine(x_grad_PH.view(grad_TKH.shape), torch.ones(num_tokens, num_choices))

    def take_step(self, learning_rate: float) -> None:
        """Have every host take its step."""
        self._check()
        self._run(
            self._tell_all(
                lambda host, address: host.step(
                    self.id, self.step, self._parts[address], learning_rate, timeout_s=self._timeout_s
                )
            )
        )
        self.step += 1
        self._parts = dict.fromkeys(self._hosts, 0)

    def save(self, folder: str) -> set[str]:
        """Have every host write what it trains: all files' names."""
        self._check()
        files = self._run(
            self._tell_all(lambda host, _: host.save(self.id, self.step, folder, timeout_s=self._timeout_s))
        )
        return {file for of_host in files.values() for file in of_host}

    # --- hosts -------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._lost is not None:
            raise TrainingLostError(str(self._lost))

    def _lose(self, cause: Exception) -> TrainingLostError:
        self._lost = TrainingLostError(f"{cause}; restore the last checkpoint, with a host for each that is gone")
        return self._lost

    def _run(self, orders: Coroutine[Any, Any, T]) -> T:
        """Carry out orders, all of them or those until a host is lost."""
        try:
            return self._transport.run(orders)
        except TrainingLostError as error:
            raise self._lose(error) from error

    async def _tell_all(self, order: Callable[[GrpcTraining, str], Awaitable[T]]) -> dict[str, T]:
        """Give each host the order made for it and its address, at once: what each answers."""
        addresses = list(self._hosts)
        answers = await _all(self._tell(address, partial(_order, order, address)) for address in addresses)
        return dict(zip(addresses, answers, strict=True))

    async def _tell(self, address: str, order: Callable[[GrpcTraining], Awaitable[T]]) -> T:
        """Give an order, again if the connection breaks. Raises TrainingLostError in the end."""
        cause = f"no answer within {self._timeout_s:g} s"
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        tries = _TRIES
        while tries:
            try:
                async with asyncio.timeout_at(deadline):
                    return await order(self._controls[address])
            except ReplicaUnavailableError as error:
                cause = error.cause
                if not await _listens(address):
                    tries -= 1
                await asyncio.sleep(_RETRY_S)
            except TimeoutError:
                break
            except (ConfigError, CheckpointError, OutOfSlotsError, ProtocolError, TrainingLostError) as error:
                raise type(error)(f"host {address}: {error}") from error
        raise TrainingLostError(f"host {address} is lost: {cause}")

    async def _all_listen(self) -> bool:
        return all(await asyncio.gather(*map(_listens, self._hosts)))

    def close(self) -> None:
        """Break its connections; hosts keep what they hold until they are filled anew. Idempotent."""
        self._transport.run(_all(control.close() for control in self._controls.values()))
        self._controls = {}


async def _listens(address: str) -> bool:
    """Whether a process is there, however slow: a kernel connects for those that are too busy to say a word."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except OSError:
        return False
    writer.close()
    return True


async def _load(host: GrpcTraining, *, expert: ExpertId, recipe: ExpertRecipe) -> None:
    await host.load(expert, recipe)


def _order(order: Callable[[GrpcTraining, str], Awaitable[T]], address: str, host: GrpcTraining) -> Awaitable[T]:
    return order(host, address)


async def _all(orders: Iterable[Awaitable[T]]) -> list[T]:
    """Wait for all, whatever becomes of some; then raise what the first of these raised."""
    answers = await asyncio.gather(*orders, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers  # type: ignore[return-value]  # none is an exception
