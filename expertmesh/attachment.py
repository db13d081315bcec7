"""The mesh's experts behind a transformers model in any script: `expertmesh.attach(model, address)`."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expertmesh.backbone import attach_model
from expertmesh.client import fetch
from expertmesh.credentials import shared_token
from expertmesh.errors import ConfigError, ProtocolError
from expertmesh.kernels.spec import DTYPES
from expertmesh.moe.exchange import Exchange
from expertmesh.moe.layer import MoeLayer
from expertmesh.placement import Placement
from expertmesh.transport.network import NetworkTransport

if TYPE_CHECKING:
    from types import TracebackType

    from expertmesh.tls import TlsFiles

REFRESH_S = 2.0
"""How often a new placement is asked for."""


def attach(model: Any, address: str, *, token: str | None = None, tls: TlsFiles | None = None) -> Attachment:
    """Let `model`, a transformers model in memory, compute its experts on the mesh whose gateway is at `address`.

    The model's own experts are freed. It must be the mesh's model: same architecture, checkpoint and dtype; and the
    machine must reach the hosts. `token` is the mesh's shared token; by default what EXPERTMESH_TOKEN or
    ~/.expertmesh/token says, which is right where the mesh was started; `tls` are the files that its config names, if
    any. Until the returned attachment is closed, the model works as before. Raises ConfigError when it and the mesh do
    not fit.
    """
    token = token or shared_token()
    served = look_up(address)
    placement, dtype = served.placement, str(model.dtype).removeprefix("torch.")
    if dtype != served.dtype:
        raise ConfigError(
            f"model: it computes in {dtype}, the experts of the mesh at {address} in {served.dtype}; load the model "
            f"with dtype=torch.{served.dtype}"
        )
    backbone = attach_model(model)
    if backbone.num_experts != placement.num_experts:
        raise ConfigError(
            f"model: it has {list(backbone.num_experts)} experts per MoE layer, the mesh at {address} "
            f"{list(placement.num_experts)}; attach the model that the mesh serves"
        )
    exchange = Exchange(NetworkTransport(token, tls=tls), placement)
    backbone.connect([MoeLayer(exchange, layer) for layer in range(len(placement.num_experts))])
    return Attachment(exchange, address)


class Attachment:
    """Keeps a model's layers connected, and follows the mesh's placements. A context manager."""

    def __init__(self, exchange: Exchange, address: str) -> None:
        self._exchange = exchange
        self._address = address
        self._closed = threading.Event()
        self._follower = threading.Thread(target=self._follow, name="expertmesh-placements", daemon=True)
        self._follower.start()

    def _follow(self) -> None:
        while not self._closed.wait(REFRESH_S):
            try:
                self._exchange.update(look_up(self._address).placement)
            except ConfigError:
                continue  # the gateway is away: the last placement stands

    def close(self) -> None:
        """Break the connections; the model's layers fail from here on. Idempotent."""
        self._closed.set()
        self._follower.join()
        self._exchange.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a mesh says of its experts: where they are, and what they take and give."""

    placement: Placement
    hidden: int
    """Width of a row."""
    dtype: str
    """Of a row: one of `kernels.spec.DTYPES`."""


def look_up(address: str) -> Served:
    """Ask the mesh whose gateway is at `address`. Raises ConfigError when none answers."""
    told = fetch(address, "/mesh/placement")
    try:
        placement = Placement.from_json(told)
    except ProtocolError as error:
        raise ConfigError(f"address: what answers at {address} is no mesh: {error}") from error
    hidden, dtype = told.get("hidden"), told.get("dtype")
    if type(hidden) is not int or hidden < 1 or dtype not in DTYPES:
        raise ConfigError(f"address: the mesh at {address} does not say which rows it takes; is it of this version?")
    return Served(placement=placement, hidden=hidden, dtype=dtype)
