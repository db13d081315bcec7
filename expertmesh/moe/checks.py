"""What a router does to find hosts that are ill, beyond waiting for them: looks at rows, probes, asks twice.

Knows which answers are beside the point of any exchange; decides nothing about where rows go. Doubts about replicas go
to whoever listens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from expertmesh.doubt import Doubt
from expertmesh.ids import ExpertId
from expertmesh.moe.dispatch import make_dispatch_plan
from expertmesh.moe.finite import not_finite
from expertmesh.moe.opinions import Case

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from numpy.typing import NDArray

    from expertmesh.clock import Clock
    from expertmesh.ids import HostId
    from expertmesh.moe.asides import Asides, Then
    from expertmesh.moe.health import Health
    from expertmesh.moe.run import Attempt, ExchangeCounts, ExchangeLimits, Run
    from expertmesh.placement import HostInfo, Placement
    from expertmesh.transport import LayerReply, Transport

_PROBE_PAIRS = 16


class Checks:
    """The checks of one exchange object, on its thread."""

    def __init__(
        self,
        transport: Transport,
        asides: Asides,
        health: Health,
        limits: ExchangeLimits,
        counts: ExchangeCounts,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        """`rng` draws which rows are computed twice."""
        self._transport = transport
        self._asides = asides
        self._health = health
        self._limits = limits
        self._counts = counts
        self._clock = clock
        self._rng = rng
        self.on_doubt: Callable[[Doubt], object] | None = None

    def _doubt(self, doubt: Doubt) -> None:
        if self.on_doubt is not None:
            self.on_doubt(doubt)

    # --- rows that are not finite ------------------------------------------------------------------------------------

    def to_do_again(self, run: Run, attempt: Attempt, is_bad_P: NDArray[np.bool_], now: float) -> NDArray[np.bool_]:
        """Which of an attempt's rows that are not finite another replica is to compute. The others are the model's own:
        a second host says the same, or this one keeps saying so, or what went in was not finite itself."""
        host = attempt.part.host.id
        self._counts.not_finite += 1
        again_P = is_bad_P.copy()
        experts = set()
        for i in np.flatnonzero(is_bad_P).tolist():
            pair = int(attempt.part.pairs[i])
            token = pair // run.num_choices
            said = run.not_finite.setdefault(pair, {})
            is_stubborn = now - said.setdefault(host, now) > self._limits.doubt_s
            if len(said) > 1 or is_stubborn or not_finite(run.x_TB[token : token + 1], run.dtype) is not None:
                again_P[i] = False
            else:
                experts.add(int(run.expert_P[pair]))
        for index in sorted(experts):
            self._doubt(Doubt(expert=ExpertId(run.layer, index), host=host, cause="its rows are not finite"))
        return again_P

    # --- second opinions ---------------------------------------------------------------------------------------------

    def maybe_ask_twice(
        self, run: Run, placement: Placement, attempt: Attempt, rows: NDArray[np.uint8], now: float
    ) -> None:
        """Have some attempts' pairs computed once more, by other hosts, where there are any."""
        share = self._limits.double_check_share
        if not share or self._rng.random() >= share:
            return
        part = attempt.part
        not_these = frozenset({part.host.id}) | self._health.avoided
        table = placement.table(run.layer, not_these)
        has_other_P = table.num_replicas_E[run.expert_P[part.pairs]] > 0
        if not has_other_P.any():
            return
        pairs = part.pairs[has_other_P]
        row_of = dict(zip(pairs.tolist(), rows[has_other_P], strict=True))
        for other in make_dispatch_plan(placement, run.layer, run.expert_P, run.num_choices, pairs, failed=not_these):
            case = Case(run.request(other, copy=True))
            case.rows[part.host.id] = np.stack([row_of[pair] for pair in other.pairs.tolist()])
            self._counts.double_checked += 1
            self._ask(case, other.host, placement, now)

    def _ask(self, case: Case, host: HostInfo, placement: Placement, now: float) -> None:
        def hear(reply: LayerReply | None, _took_s: float) -> None:
            if reply is not None:
                case.hear(host.id, reply.rows.copy(), lambda case: self._ask_third(case, placement), self._doubt)
            else:
                case.not_heard(self._doubt)

        ticket = self._transport.send(host, case.request)
        self._asides.watch(ticket, now, self._limits.attempt_timeout_s, hear)

    def _ask_third(self, case: Case, placement: Placement) -> bool:
        """Ask a host that has not been asked yet and holds all experts of the case; whether there is one.

        One that is avoided, if there is no other: it may be slow, but here nobody waits for it.
        """
        experts = [ExpertId(case.request.layer, index) for index in case.request.experts]
        holders = [set(placement.replicas.get(expert, ())) for expert in experts]
        others = set.intersection(*holders) - case.rows.keys()
        avoided = self._health.avoided
        able = (host for host in placement.hosts if host.id in others)
        third = min(able, key=lambda host: host.id in avoided, default=None)
        if third is not None:
            self._ask(case, third, placement, self._clock.monotonic())
        return third is not None

    # --- probation ---------------------------------------------------------------------------------------------------

    def probe(self, run: Run, placement: Placement, now: float) -> None:
        """Send copies of some of a run's rows to the hosts on probation that are due."""
        for host in self._health.to_probe(now):
            others = frozenset(other.id for other in placement.hosts if other.id != host)
            holds_P = placement.table(run.layer, others).num_replicas_E[run.expert_P] > 0
            pairs = np.flatnonzero(holds_P & (run.expert_P >= 0))[:_PROBE_PAIRS]
            if not len(pairs):
                continue  # it holds none of these: another layer's rows will do
            plan = make_dispatch_plan(placement, run.layer, run.expert_P, run.num_choices, pairs, failed=others)
            ticket = self._transport.send(plan[0].host, run.request(plan[0], copy=True))
            self._asides.watch(ticket, now, self._health.probe_timeout_s, self._judge(host, len(pairs)))

    def _judge(self, host: HostId, num_pairs: int) -> Then:
        def judge(reply: LayerReply | None, took_s: float) -> None:
            self._health.probed(host, num_pairs, None if reply is None else took_s, self._clock.monotonic())

        return judge
