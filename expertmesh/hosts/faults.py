"""The faults of a host that was started to be broken: which of them are on, whom they hit, and how often they did.

A host computes and answers as ever; this stands between it and those who ask. Its invariant: `fired` counts what has
really happened, each time that it did.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from typing import TYPE_CHECKING

from expertmesh import signals
from expertmesh.fault import AT_ONCE, FaultKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from expertmesh.clock import Clock
    from expertmesh.fault import Fault
    from expertmesh.hosts.host import MakeKernel
    from expertmesh.hosts.rows import Refusal, Respond
    from expertmesh.kernels import ExpertKernel
    from expertmesh.kernels.spec import ExpertSpec, ExpertWeights
    from expertmesh.transport import LayerReply


class Faults:
    """Those of one host. All but the kernels' side is used on the host's event loop."""

    def __init__(self, clock: Clock) -> None:
        self.fired: Counter[FaultKind] = Counter()
        """Since the host started."""
        self._clock = clock
        self._rng = random.Random()
        self._on: dict[FaultKind, tuple[Fault, float]] = {}
        """Each with the time when it ends."""
        self._changed = asyncio.Event()

    def replace(self, faults: Iterable[Fault], seed: int) -> None:
        """From now on these, and no others; what they hit is drawn from `seed`."""
        now = self._clock.monotonic()
        self._rng.seed(seed)
        self._on = {fault.kind: (fault, now + (fault.seconds or float("inf"))) for fault in faults}
        self._changed.set()
        self._changed = asyncio.Event()
        for kind in AT_ONCE & self._on.keys():
            fault, _ = self._on.pop(kind)
            self.fired[kind] += 1
            if kind is FaultKind.PAUSE:
                signals.pause_soon(fault.seconds)
            elif kind is FaultKind.KILL:
                signals.kill_soon()
            else:
                signals.kill_parent_soon()

    def hits(self, kind: FaultKind) -> bool:
        """Whether a fault of this kind strikes now; it is counted if so."""
        fault = self._find(kind)
        if fault is None or (fault.share < 1 and self._rng.random() >= fault.share):
            return False
        self.fired[kind] += 1
        return True

    def _find(self, kind: FaultKind) -> Fault | None:
        """The fault of this kind that is on."""
        if kind not in self._on:
            return None
        fault, until = self._on[kind]
        if self._clock.monotonic() < until:
            return fault
        del self._on[kind]
        return None

    # --- messages ----------------------------------------------------------------------------------------------------

    def meddle(self, respond: Respond) -> Respond | None:
        """What is to answer a request that has just come, in place of `respond`. None: the request vanishes."""
        if not self._on:
            return respond
        if self.hits(FaultKind.SILENCE) or self.hits(FaultKind.DROP_REQUEST):
            return None

        def meddled(answer: LayerReply | Refusal | None) -> None:
            if self.hits(FaultKind.SILENCE) or self.hits(FaultKind.DROP_REPLY):
                respond(None)
                return
            respond(answer)
            if self.hits(FaultKind.DUPLICATE_REPLY):
                respond(answer)

        return meddled

    async def wait_heard(self) -> None:
        """Return once an order is read: at once, unless the host is silent."""
        if not self.hits(FaultKind.SILENCE):
            return
        while (silence := self._find(FaultKind.SILENCE)) is not None:
            left_s = self._on[FaultKind.SILENCE][1] - self._clock.monotonic() if silence.seconds else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._changed.wait()

    # --- launches ----------------------------------------------------------------------------------------------------

    def kernels(self, make: MakeKernel) -> MakeKernel:
        """Kernels that are slow, or wrong, when such a fault is on."""

        def make_faulty(spec: ExpertSpec, num_slots: int, device: str) -> ExpertKernel:
            return _FaultyKernel(make(spec, num_slots, device), self)

        return make_faulty

    def compute(
        self, kernel: ExpertKernel, x_TH: torch.Tensor, row_P: torch.Tensor, slot_P: torch.Tensor
    ) -> torch.Tensor:
        """What a launch answers, and when."""
        began_s = self._clock.monotonic()
        y_PH = kernel.run(x_TH, row_P, slot_P)
        if not self._on:
            return y_PH
        if self.hits(FaultKind.CORRUPT):
            y_PH = self._with_wrong_number(y_PH, float(y_PH.float().abs().max()) + 1.0)
        if self.hits(FaultKind.NOT_FINITE):
            y_PH = self._with_wrong_number(y_PH, float("nan"))
        if self.hits(FaultKind.SLOW):
            factor = self._on[FaultKind.SLOW][0].factor
            time.sleep((factor - 1) * (self._clock.monotonic() - began_s))  # noqa: TID251 - a device that takes its time
        return y_PH

    def _with_wrong_number(self, y_PH: torch.Tensor, number: float) -> torch.Tensor:
        """The same but for one number of one row."""
        y_PH = y_PH.clone()
        y_PH[self._rng.randrange(len(y_PH)), self._rng.randrange(y_PH.shape[1])] = number
        return y_PH


class _FaultyKernel:
    """`ExpertKernel` whose launches faults may hit."""

    def __init__(self, kernel: ExpertKernel, faults: Faults) -> None:
        self.spec = kernel.spec
        self.num_slots = kernel.num_slots
        self._kernel = kernel
        self._faults = faults

    def write(self, slot: int, weights: ExpertWeights) -> None:
        self._kernel.write(slot, weights)

    def clear(self, slot: int) -> None:
        self._kernel.clear(slot)

    def run(self, x_TH: torch.Tensor, row_P: torch.Tensor, slot_P: torch.Tensor) -> torch.Tensor:
        return self._faults.compute(self._kernel, x_TH, row_P, slot_P)
