"""Experts that hosts train: forward by the exchange, backward to the same hosts, steps, checkpoints, recovery.

Owns one session of training over hosts that were started for it (`python -m expertmesh.hosts --train FOLDER`), and the
numbers by which nothing is counted twice. Knows neither gates nor models.

What is lost with a host cannot be had again but from a checkpoint. So the one answer to any loss is TrainingLostError,
and the one way on is `restore`, which takes every host back to one step. Invariant: after it, training goes on exactly
as it would have without the loss, bit for bit on machines of one kind.

Shapes: T tokens, K experts per token, P pairs, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from expertmesh.checkpoint.layer_folder import complete_folder, index_layers, prepare_folder, read_config
from expertmesh.checkpoint.trained import file_of
from expertmesh.credentials import shared_token
from expertmesh.errors import CheckpointError, ConfigError, TrainingLostError
from expertmesh.layers.session import Session
from expertmesh.optimizer import Optimizer, check_learning_rate
from expertmesh.transport.network import NetworkTransport

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from expertmesh.layers.session import Assignment
    from expertmesh.tls import TlsFiles


class TrainedExperts:
    """The experts of a folder (`checkpoint.layer_folder`), trained by hosts. See `experts.Experts`.

    One trainer at a time, and one thread. Every step begins with any number of forward and backward passes, whose
    gradients add up, and ends with `step`. All but `restore` and `close` raise TrainingLostError when a host is gone,
    or taken over by another trainer, and go on raising it until `restore`.
    """

    def __init__(
        self,
        folder: Path,
        hosts: Sequence[str],
        optimizer: Optimizer | None = None,
        *,
        placement: Assignment | None = None,
        token: str | None = None,
        tls: TlsFiles | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        """Fill `hosts` (addresses, "host:port") from `folder`, which they read by the same path, and begin.

        `optimizer` is AdamW unless given. `placement` says which host trains an expert; by default they are dealt out
        by the hosts' room. `token` and `tls` as for `expertmesh.attach`. `timeout_s`: a host that has not answered for
        so long is taken to be lost.

        Raises ConfigError when the hosts do not fit or may not be trained, CheckpointError when the folder is not
        whole, TrainingLostError when a host cannot be reached.
        """
        config = read_config(folder)
        self.hidden = config.hidden
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.num_experts = (config.num_experts,) * config.num_layers
        self._config = config
        self._optimizer = optimizer or Optimizer()
        self._token = token or shared_token()
        self._tls = tls
        self._timeout_s = timeout_s
        self._hosts: Sequence[str] = hosts
        self._transport = NetworkTransport(self._token, tls=tls)
        self._session: Session | None = None
        try:
            self.restore(folder, hosts, placement)
        except BaseException:
            self.close()
            raise

    @property
    def steps(self) -> int:
        """How many steps the experts have behind them."""
        return self._config.step

    def rows(self, layer: int, x_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        """The experts' gradients are added up by the hosts when torch goes back through the result."""
        # The rows need a gradient whether or not x does, for the experts' sake.
        anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
        arguments = (x_TH, anchor, index_TK, layer, self._running())
        rows: torch.Tensor = _Exchanged.apply(*arguments)  # type: ignore[no-untyped-call]
        return rows

    def step(self, learning_rate: float) -> None:
        """Have the hosts take their optimisers' step with the gradients since the last one."""
        check_learning_rate(learning_rate)
        self._running().take_step(learning_rate)
        self._config = self._config.model_copy(update={"step": self.steps + 1})

    def save(self, folder: Path) -> None:
        """Write a checkpoint of the experts and of their optimisers' state, from which `restore` goes on.

        Save what else is trained, the gate and the rest of the model, beside it. It is a folder like that which
        training began from, and can be served. Raises ConfigError when `folder` holds a checkpoint already, or hosts
        may not save there.
        """
        session, folder = self._running(), folder.absolute()
        prepare_folder(folder)
        files = session.save(str(folder))
        if missing := {file_of(expert) for expert in self._config.experts} - files:
            raise CheckpointError(f"{folder}: {min(missing)} was not written")
        complete_folder(folder, self._config)

    def restore(
        self,
        folder: Path,
        hosts: Sequence[str] | None = None,
        placement: Assignment | None = None,
    ) -> None:
        """Take all experts back to a checkpoint, on other hosts if `hosts` are given: in place of those that are gone.

        Restore what else is trained to the same step, and do the steps since once more. Raises as the constructor.
        """
        config, folder = read_config(folder), folder.absolute()
        if config.model_copy(update={"step": 0}) != self._config.model_copy(update={"step": 0}):
            raise ConfigError(f"folder: {folder} holds other experts than these; restore a checkpoint of them")
        self._hosts = self._hosts if hosts is None else hosts
        self._end()
        self._session = Session(
            self._transport,
            index_layers(folder),
            config.step,
            self._hosts,
            placement,
            self._optimizer,
            token=self._token,
            tls=self._tls,
            timeout_s=self._timeout_s,
        )
        self._config = config

    def _running(self) -> Session:
        if self._session is None:
            raise TrainingLostError("no training is under way: restore a checkpoint")
        return self._session

    def _end(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def close(self) -> None:
        """Break the connections. The hosts keep what they hold, until somebody fills them anew. Idempotent."""
        self._end()
        self._transport.close()

    def __enter__(self) -> TrainedExperts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Exchanged(torch.autograd.Function):
    """The exchange there, and back to the same experts."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: torch.Tensor, _anchor: torch.Tensor, index_TK: torch.Tensor, layer: int, session: Session
    ) -> torch.Tensor:
        x_cpu_TH, index_cpu_TK = x_TH.detach().cpu(), index_TK.cpu()
        ctx.save_for_backward(x_cpu_TH, index_cpu_TK)
        ctx.layer, ctx.session, ctx.step = layer, session, session.step
        return session.forward(layer, x_cpu_TH, index_cpu_TK).to(x_TH.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TKH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TH, index_TK = ctx.saved_tensors
        session: Session = ctx.session
        if session.step != ctx.step:
            raise ConfigError(f"these rows are of step {ctx.step}, and a step was taken since: go back before the step")
        x_grad_TH = session.backward(ctx.layer, x_TH, index_TK, grad_TKH.cpu())
        return x_grad_TH.to(grad_TKH.device), None, None, None, None
