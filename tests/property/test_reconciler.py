"""The control plane against a world where everything goes wrong: what it promises holds at every step, and when the
faults stop it arrives at what was wanted.

The world is the oracle. It knows what each host really holds and what each router really uses; the controller under
test, a ledger and the reconciler, knows only what messages tell it. They are lost, late, repeated and out of order.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expertmesh.control.actions import Action, Drop, Limits, Load, Publish, StopHost
from expertmesh.control.ledger import Ledger
from expertmesh.control.reconciler import Steps, reconcile
from expertmesh.ids import ExpertId, HostId

EXPERTS = [ExpertId(0, i) for i in range(5)]
TROUBLES = ["", "orders wait", "calls break, orders wait", "no reports", "late reports", "no placements", "one router"]
Replicas = dict[ExpertId, tuple[HostId, ...]]


@dataclass
class Process:
    """A host as it really is."""

    slots: int
    is_alive: bool = True
    held: set[ExpertId] = field(default_factory=set)
    by_surprise: set[ExpertId] = field(default_factory=set)
    """Loaded after the controller had given the load up, or by the controller before it."""
    quarantined: set[ExpertId] = field(default_factory=set)
    """Held, and not to be used, as far as the controller knows."""
    condemned: set[ExpertId] = field(default_factory=set)
    """Those of them that are wrong."""

    def forget(self, expert: ExpertId) -> None:
        """It is held no more."""
        for experts in (self.held, self.by_surprise, self.quarantined, self.condemned):
            experts.discard(expert)


@dataclass
class Router:
    """A router as it really is: it uses the placement that it got last."""

    epoch: int = 0
    replicas: Replicas = field(default_factory=dict)


@dataclass
class Order:
    """An action on its way to a host, given by the n-th controller."""

    action: Load | Drop | StopHost
    controller: int
    is_given_up: bool = False
    """The controller was told that it failed, though it may yet be carried out."""


@dataclass
class Question:
    """A host is asked what it holds; `held` is its answer, once it has given it."""

    host: HostId
    asked_at: float
    held: set[ExpertId] | None = None


def feasible(rng: random.Random, slots: dict[HostId, int], min_replicas: int, more: float = 0.4) -> Replicas | None:
    """A random placement that leaves a slot free on each host, or None when there is none such.

    `more`: the chance of a further replica in a slot that would stay free otherwise.
    """
    room = {host: n - 1 for host, n in slots.items()}
    replicas: dict[ExpertId, list[HostId]] = {}
    for expert in rng.sample(EXPERTS, len(EXPERTS)):
        by_room = sorted(room, key=lambda host: (-room[host], rng.random()))[:min_replicas]
        if len(by_room) < min_replicas or any(room[host] <= 0 for host in by_room):
            return None
        replicas[expert] = by_room
        for host in by_room:
            room[host] -= 1
    for host in sorted(room):
        for expert in rng.sample(EXPERTS, len(EXPERTS)):
            if room[host] > 0 and host not in replicas[expert] and rng.random() < more:
                replicas[expert].append(host)
                room[host] -= 1
    return {expert: tuple(hosts) for expert, hosts in replicas.items()}


class World(RuleBasedStateMachine):
    """Hosts, routers, messages and a controller."""

    @initialize(min_replicas=st.integers(1, 2), seed=st.integers(0, 2**16), serves=st.booleans())
    def begin(self, min_replicas: int, seed: int, serves: bool) -> None:
        rng = random.Random(seed)
        self.limits = Limits(
            min_replicas=min_replicas,
            loads_per_host=2,
            loads_at_once=4,
            load_timeout_s=20,
            drop_timeout_s=10,
            stop_timeout_s=10,
            retry_longest_s=8,
            router_lease_s=30,
        )
        self.now = 0.0
        self.processes: dict[HostId, Process] = {}
        self.routers: dict[str, Router] = {}
        self.orders: list[Order] = []
        self.answers: list[tuple[Order, str]] = []
        self.questions: list[Question] = []
        self.controller = 0
        self.known: set[HostId] = set()
        self.draining: set[HostId] = set()
        self.placements: dict[int, Replicas] = {}
        self.sent_epoch = 0
        self.desired: Replicas = {}
        self.refused = 0
        self.started = 0
        self.ledger = Ledger(self.limits, self.now)
        self.slots = [3, 4] if min_replicas == 1 else [5, 6]
        for _ in range(3):
            self.start_host(slots=rng.choice(self.slots))
        for name in ("r0", "r1"):
            self.routers[name] = Router()
        desired = feasible(rng, self.room(), min_replicas)
        assume(desired is not None)
        self.desired = desired
        if serves:
            self.seconds_pass(10)
            assert all(router.epoch for router in self.routers.values())

    # --- what the world does -----------------------------------------------------------------------------------------

    def room(self) -> dict[HostId, int]:
        """The slots of the hosts that may be given replicas."""
        return {host: self.processes[host].slots for host in sorted(self.known - self.draining) if self.is_up(host)}

    def is_up(self, host: HostId) -> bool:
        return host in self.processes and self.processes[host].is_alive

    def start_host(self, slots: int) -> None:
        host = HostId(f"h{self.started}")
        self.started += 1
        self.processes[host] = Process(slots)
        self.known.add(host)
        self.ledger.host_started(host, self.now)

    def ask(self, host: HostId) -> Question:
        question = Question(host, self.now)
        self.questions.append(question)
        return question

    def see(self, question: Question) -> None:
        """A host reads a question and sends its answer."""
        if question.held is None and self.is_up(question.host):
            question.held = set(self.processes[question.host].held)

    def tell(self, question: Question) -> None:
        """The answer to a question arrives."""
        self.see(question)
        if question.held is not None:
            slots = self.processes[question.host].slots
            self.ledger.report(question.host, (slots,), question.held, question.asked_at)

    def carry_out(self, order: Order) -> str | None:
        """An order reaches its host: the answer, "" for done; None when there is nobody to answer."""
        action = order.action
        process = self.processes.get(action.host)
        if process is None or not process.is_alive:
            return None
        is_late = self.now >= action.deadline
        if isinstance(action, Load):
            if action.expert in process.held:
                return ""
            if len(process.held) >= process.slots:
                self.refused += 1
                return "no free slot"
            process.held.add(action.expert)
            if is_late or order.is_given_up or order.controller != self.controller:
                process.by_surprise.add(action.expert)
            return ""
        if is_late:
            return "too late"
        if isinstance(action, Drop):
            process.forget(action.expert)
        else:
            assert process.held <= process.by_surprise, f"{action.host} was stopped while it held {process.held}"
            process.is_alive = False
        return ""

    def answer(self, order: Order, cause: str) -> None:
        if order.controller != self.controller:
            return
        order.is_given_up |= bool(cause)
        if isinstance(order.action, Load) and cause and order.action.expert in self.processes[order.action.host].held:
            self.processes[order.action.host].by_surprise.add(order.action.expert)
        if cause:
            self.ledger.failed(order.action, cause, self.now)
        else:
            self.ledger.done(order.action, self.now)
            if isinstance(order.action, StopHost):
                self.known.discard(order.action.host)

    def send_placement(self, name: str, *, arrives: bool) -> None:
        """A router asks for a newer placement."""
        router = self.routers[name]
        self.ledger.router_uses(name, router.epoch or self.sent_epoch, self.now)
        if arrives and self.sent_epoch > router.epoch:
            router.epoch, router.replicas = self.sent_epoch, self.placements[self.sent_epoch]

    def seconds_pass(self, seconds: int, trouble: str = "") -> Steps:
        """Every message arrives within the second and every order is carried out, but for one kind of trouble."""
        for _ in range(seconds):
            self.now += 1
            if trouble == "calls break, orders wait":
                for order in self.orders:
                    self.answer(order, "connection reset")
            elif trouble != "orders wait":
                orders, self.orders = self.orders, []
                for order in orders:
                    result = self.carry_out(order)
                    self.answer(order, "unavailable" if result is None else result)
            if trouble != "no reports":
                self.deaths_are_noticed()
                asked = [self.ask(host) for host in sorted(self.known)]
                for question in asked:
                    self.see(question)
                arriving = (
                    asked if trouble != "late reports" else [q for q in self.questions if q.asked_at < self.now - 2]
                )
                for question in reversed(arriving):
                    self.tell(question)
                    self.questions.remove(question)
            steps = self.turn()
            for name in self.routers:
                self.send_placement(
                    name, arrives=trouble != "no placements" and (trouble != "one router" or name == "r0")
                )
            self.no_router_uses_a_replica_that_we_dropped()
        return steps

    # --- what the controller does, and what it may not do ------------------------------------------------------------

    def turn(self) -> Steps:
        observed = self.ledger.observed(self.now)
        steps = reconcile(self.desired, observed, self.limits, self.now)
        assert steps == reconcile(self.desired, observed, self.limits, self.now)
        for action in steps.actions:
            self.check(action)
            self.ledger.begun(action, self.now)
            if isinstance(action, Publish):
                self.placements[action.epoch] = dict(action.replicas)
                self.sent_epoch = action.epoch
            else:
                self.orders.append(Order(action, self.controller))
        return steps

    def holds(self, host: HostId, expert: ExpertId) -> bool:
        """Whether a host that the controller does not know to be gone has, or had when it died, a replica to use."""
        dropping = any(
            isinstance(order.action, Drop)
            and (order.action.host, order.action.expert) == (host, expert)
            and self.now < order.action.deadline
            for order in self.orders
        )
        process = self.processes[host]
        return host in self.known and expert in process.held - process.quarantined and not dropping

    def check(self, action: Action) -> None:
        newest = max(self.sent_epoch, *(router.epoch for router in self.routers.values()))
        current = self.placements[newest] if newest else {}
        if isinstance(action, Drop) and action.expert not in self.processes[action.host].condemned:
            others = [host for host in self.known - {action.host} if self.holds(host, action.expert)]
            assert others, f"{action}: nobody else has it"
            named = current.get(action.expert, ())
            assert not current or any(host in named for host in others), f"{action}: routers know of no other"
        elif isinstance(action, Load):
            process = self.processes[action.host]
            taken = process.held - process.by_surprise
            taken |= {
                order.action.expert
                for order in self.orders
                if isinstance(order.action, Load)
                and order.action.host == action.host
                and order.controller == self.controller
                and not order.is_given_up
                and self.now < order.action.deadline
            }
            assert action.host not in self.draining, f"{action}: the host is to be emptied"
            assert len(taken - {action.expert}) < process.slots, f"{action}: over its slots"
        elif isinstance(action, Publish):
            assert action.epoch > max(router.epoch for router in self.routers.values())
            for expert, hosts in action.replicas.items():
                unheld = [host for host in hosts if not self.holds(host, expert)]
                assert not unheld, f"{action}: {expert} is not ready on {unheld}"
            for expert, hosts in current.items():
                if any(self.holds(host, expert) for host in hosts):
                    assert action.replicas.get(expert), f"{action}: unpublishes the last of {expert}"

    @invariant()
    def no_router_uses_a_replica_that_we_dropped(self) -> None:
        for name, router in getattr(self, "routers", {}).items():
            for expert, hosts in router.replicas.items():
                for host in hosts:
                    if self.is_up(host):
                        assert expert in self.processes[host].held, (
                            f"{name} uses {expert} on {host}, epoch {router.epoch}"
                        )

    @invariant()
    def no_host_is_over_its_slots(self) -> None:
        for process in getattr(self, "processes", {}).values():
            assert len(process.held) <= process.slots

    # --- rules -------------------------------------------------------------------------------------------------------

    @rule()
    def take_a_turn(self) -> None:
        self.turn()

    @rule(seconds=st.sampled_from([0.1, 1, 6, 11, 31]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for name in self.routers:
            self.send_placement(name, arrives=False)

    @precondition(lambda self: self.orders)
    @rule(data=st.data(), fate=st.sampled_from(["done", "answer late", "answer lost", "twice", "fails", "lost"]))
    def an_order_meets_its_fate(self, data: st.DataObject, fate: str) -> None:
        order = self.orders.pop(data.draw(st.integers(0, len(self.orders) - 1)))
        if fate == "twice":
            self.orders.append(order)
        result = "the disk is broken" if fate == "fails" else None if fate == "lost" else self.carry_out(order)
        if result is None:
            result = "unavailable"
        if fate in ("done", "twice", "fails", "lost"):
            self.answer(order, result)
        elif fate == "answer late":
            self.answers.append((order, result))
        elif fate == "answer lost":
            self.answer(order, "connection reset")

    @rule(seconds=st.integers(1, 8), trouble=st.sampled_from(TROUBLES))
    def a_while_passes(self, seconds: int, trouble: str) -> None:
        self.seconds_pass(seconds, trouble)

    @precondition(lambda self: self.answers)
    @rule(data=st.data())
    def a_late_answer_arrives(self, data: st.DataObject) -> None:
        self.answer(*self.answers.pop(data.draw(st.integers(0, len(self.answers) - 1))))

    @rule(data=st.data(), answers=st.booleans())
    def a_host_is_asked(self, data: st.DataObject, answers: bool) -> None:
        question = self.ask(data.draw(st.sampled_from(sorted(self.processes))))
        if answers:
            self.see(question)

    @precondition(lambda self: self.questions)
    @rule(data=st.data(), again=st.booleans())
    def a_report_arrives(self, data: st.DataObject, again: bool) -> None:
        index = data.draw(st.integers(0, len(self.questions) - 1))
        self.tell(self.questions[index])
        if not again:
            del self.questions[index]

    @rule(data=st.data(), arrives=st.booleans())
    def a_router_asks(self, data: st.DataObject, arrives: bool) -> None:
        self.send_placement(data.draw(st.sampled_from(sorted(self.routers))), arrives=arrives)

    @rule(data=st.data())
    def a_router_is_replaced(self, data: st.DataObject) -> None:
        del self.routers[data.draw(st.sampled_from(sorted(self.routers)))]
        self.routers[f"r{len(self.routers)}-{self.now}-{len(self.placements)}"] = Router()

    @precondition(lambda self: sum(process.is_alive for process in self.processes.values()) > 2)
    @rule(data=st.data(), is_noticed=st.booleans())
    def a_host_dies(self, data: st.DataObject, is_noticed: bool) -> None:
        host = data.draw(st.sampled_from([host for host in self.processes if self.is_up(host)]))
        self.processes[host].is_alive = False
        if is_noticed:
            self.notice(host)

    @rule()
    def deaths_are_noticed(self) -> None:
        for host in sorted(self.known):
            if not self.is_up(host):
                self.notice(host)

    def notice(self, host: HostId) -> None:
        self.ledger.host_gone(host)
        self.known.discard(host)
        self.draining.discard(host)

    @rule(data=st.data())
    def a_host_seems_unreachable(self, data: st.DataObject) -> None:
        self.ledger.host_unreachable(data.draw(st.sampled_from(sorted(self.processes))), self.now)

    @rule(data=st.data())
    def replicas_are_doubted(self, data: st.DataObject) -> None:
        for host in sorted(self.known):
            for expert in data.draw(st.sets(st.sampled_from(EXPERTS), max_size=2)):
                if self.ledger.doubted(host, expert, "its rows are not finite", self.now):
                    self.processes[host].quarantined.add(expert)

    @rule(founded=st.sampled_from([True, False]))
    def doubts_are_settled(self, founded: bool) -> None:
        for host in sorted(self.known):
            process = self.processes[host]
            for expert in sorted(process.quarantined - process.condemned):
                if founded:
                    self.ledger.condemned(host, expert, "it answers wrongly", self.now)
                    process.condemned.add(expert)
                else:
                    self.ledger.cleared(host, expert, self.now)
                    process.quarantined.discard(expert)

    @precondition(lambda self: len(self.known) < 5)
    @rule(large=st.booleans())
    def a_host_starts(self, large: bool) -> None:
        self.start_host(self.slots[large])

    @precondition(lambda self: self.known - self.draining)
    @rule(data=st.data())
    def a_host_is_drained(self, data: st.DataObject) -> None:
        host = data.draw(st.sampled_from(sorted(self.known - self.draining)))
        self.draining.add(host)
        self.ledger.host_draining(host, self.now)

    @rule(seed=st.integers(0, 2**16))
    def another_placement_is_wanted(self, seed: int) -> None:
        self.desired = feasible(random.Random(seed), self.room(), self.limits.min_replicas) or self.desired

    @rule(data=st.data())
    def nonsense_is_wanted(self, data: st.DataObject) -> None:
        hosts = st.lists(st.sampled_from([*sorted(self.processes), HostId("nowhere")]), max_size=4)
        self.desired = {expert: tuple(data.draw(hosts)) for expert in data.draw(st.sets(st.sampled_from(EXPERTS)))}

    @rule(adopts=st.sampled_from(["nothing", "the newest"]))
    def the_controller_restarts(self, adopts: str) -> None:
        self.controller += 1
        self.ledger = Ledger(self.limits, self.now, restarted=True)
        self.answers.clear()
        self.questions.clear()
        self.known = {host for host in self.known if self.is_up(host)}
        for host in sorted(self.known):
            self.ledger.host_started(host, self.now)
            if host in self.draining:
                self.ledger.host_draining(host, self.now)
        for process in self.processes.values():
            process.by_surprise |= process.held
            process.quarantined.clear()
            process.condemned.clear()
        self.sent_epoch = 0
        kept = max(router.epoch for router in self.routers.values())
        if self.placements and adopts == "the newest":
            epoch = max(self.placements)
            self.ledger.adopt(epoch, self.placements[epoch], self.now)
            self.sent_epoch = kept = epoch
        # Nobody knows of later ones: their epochs may be used again.
        self.placements = {epoch: replicas for epoch, replicas in self.placements.items() if epoch <= kept}

    # --- the end of all faults ---------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.answers.clear()
        self.questions.clear()
        self.deaths_are_noticed()
        self.doubts_are_settled(founded=False)
        rng = random.Random(0)
        while (desired := feasible(rng, self.room(), self.limits.min_replicas)) is None:
            self.start_host(self.slots[0])
        self.desired = desired
        for second in range(150):
            refused = self.refused
            steps = self.seconds_pass(1)
            # What became of earlier, lost orders is known when they are past their deadlines and hosts were asked.
            assert self.refused == refused or second < 2 * self.limits.load_timeout_s
            assert not steps.blocked, steps.blocked
            if steps.is_converged and not self.draining & self.known and self.all_is_as_wanted():
                return
        raise AssertionError(f"not there after {second + 1} s: {steps}, {self.ledger.observed(self.now)}")

    def all_is_as_wanted(self) -> bool:
        wanted = {expert: set(hosts) for expert, hosts in self.desired.items()}
        holders = {expert: {host for host in self.known if expert in self.processes[host].held} for expert in EXPERTS}
        told = [{expert: set(hosts) for expert, hosts in router.replicas.items()} for router in self.routers.values()]
        return holders == wanted and all(replicas == wanted for replicas in told)


TestWorld = World.TestCase
TestWorld.settings = settings(
    max_examples=300,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@given(seed=st.integers(0, 2**32), min_replicas=st.integers(1, 2), num_hosts=st.integers(3, 4))
@settings(max_examples=200, deadline=None, derandomize=True, phases=[Phase.generate])
def test_one_free_slot_per_host_is_enough_to_get_anywhere(seed: int, min_replicas: int, num_hosts: int) -> None:
    """From any placement to any other one that leaves it free, however full the hosts are else."""
    rng = random.Random(seed)
    slots = {HostId(f"h{i}"): rng.randint(3, 5) for i in range(num_hosts)}
    old, new = (feasible(rng, slots, min_replicas, more=1.0) for _ in range(2))
    assume(old is not None)
    assume(new is not None)
    limits, now = Limits(min_replicas=min_replicas, loads_at_once=rng.randint(1, 3), publish_every_s=0), 0.0
    ledger = Ledger(limits, now)
    for host, number in slots.items():
        ledger.host_started(host, now)
        ledger.report(host, (number,), [expert for expert, hosts in old.items() if host in hosts], now)
    ledger.begun(Publish(epoch=1, replicas=old), now)
    for _ in range(100):
        now += 1
        steps = reconcile(new, ledger.observed(now), limits, now)
        assert not steps.blocked, steps.blocked
        if steps.is_converged:
            return
        for action in rng.sample(steps.actions, len(steps.actions)):
            ledger.begun(action, now)
            if not isinstance(action, Publish):
                ledger.done(action, now)
    raise AssertionError(f"not there after {now} s: {ledger.observed(now)}")
