"""How many hosts a pool should have: by load, by hand, and never too few to hold the model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from expertmesh.control.scaling import DrainHost, PoolHost, PoolPolicy, Scaler, StartHost, Step
from expertmesh.control.state import HostStatus
from expertmesh.errors import BusyError, ConfigError
from expertmesh.ids import HostId

NUM_EXPERTS = 8


def policy(pool: str = "cpu", least: int = 1, most: int = 4, target: float = 0.6) -> PoolPolicy:
    return PoolPolicy(
        pool=pool,
        min_hosts=least,
        max_hosts=most,
        target=target,
        band=0.1,
        up_after_s=30,
        down_after_s=300,
        cooldown_s=60,
    )


class Pools:
    """Hosts that start and drain in `takes_s` seconds, share `work` evenly, and a scaler that looks every second."""

    def __init__(self, *policies: PoolPolicy, min_replicas: int = 1, slots: int = 8, takes_s: int = 5, **hosts: int):
        self.scaler = Scaler(policies, [NUM_EXPERTS], min_replicas)
        self.slots, self.takes_s = slots, takes_s
        self.now = 0
        self.started = 0
        self.hosts: dict[str, dict[HostId, tuple[HostStatus, int]]] = {p.pool: {} for p in policies}
        self.work: dict[str, Callable[[int], float]] = {p.pool: lambda _: 0.0 for p in policies}
        self.replicas: dict[HostId, int] = {}
        self.steps: list[tuple[int, Step]] = []
        for pool, number in hosts.items():
            for _ in range(number):
                self.add(pool, HostStatus.READY)

    def add(self, pool: str, status: HostStatus) -> None:
        self.hosts[pool][HostId(f"{pool}-{self.started}")] = (status, self.now)
        self.started += 1

    def seconds(self, number: int) -> list[tuple[int, Step]]:
        """Let time pass: the steps taken in it, with when."""
        before = len(self.steps)
        for _ in range(number):
            self.now += 1
            for step in self.look():
                self.steps.append((self.now, step))
                if isinstance(step, StartHost):
                    self.add(step.pool, HostStatus.STARTING)
                else:
                    self.hosts[step.pool][step.host] = (HostStatus.DRAINING, self.now)
        return self.steps[before:]

    def look(self) -> list[Step]:
        seen = {}
        for pool, hosts in self.hosts.items():
            for host, (status, since) in list(hosts.items()):
                if status is HostStatus.STARTING and self.now >= since + self.takes_s:
                    hosts[host] = (HostStatus.READY, self.now)
                if status is HostStatus.DRAINING and self.now >= since + self.takes_s:
                    del hosts[host]
            ready = self.ready(pool)
            seen[pool] = [
                PoolHost(
                    host=host,
                    status=status,
                    slots=() if status is HostStatus.STARTING else (self.slots,),
                    replicas=self.replicas.get(host, 4),
                    busy=self.work[pool](self.now) / ready if ready else 0.0,
                )
                for host, (status, _) in hosts.items()
            ]
        return self.scaler.decide(seen, self.now)

    def ready(self, pool: str = "cpu") -> int:
        return sum(status is HostStatus.READY for status, _ in self.hosts[pool].values())


# --- by load ---------------------------------------------------------------------------------------------------------


def test_a_pool_grows_by_one_after_sustained_load_and_says_why() -> None:
    pools = Pools(policy(), cpu=1)
    pools.work["cpu"] = lambda _: 0.9
    ((at, step),) = pools.seconds(89)
    assert 30 < at < 40
    assert isinstance(step, StartHost)
    assert step.why == "pool cpu has 1 hosts of 2: cpu was 90% busy, above its target of 60%, for 30 s"


def test_a_peak_shorter_than_it_takes_to_start_a_host_changes_nothing() -> None:
    pools = Pools(policy(), cpu=2)
    pools.work["cpu"] = lambda now: 2.0 if now % 60 < 10 else 0.6
    assert pools.seconds(400) == []


def test_a_pool_grows_one_by_one_with_a_cool_down_up_to_its_maximum() -> None:
    pools = Pools(policy(most=3), cpu=1)
    pools.work["cpu"] = lambda _: 10.0
    first, second = (at for at, _ in pools.seconds(600))
    assert second - first >= 60
    assert pools.ready() == 3


def test_a_host_that_is_starting_counts_before_it_is_ready() -> None:
    pools = Pools(policy(), cpu=1, takes_s=400)
    pools.work["cpu"] = lambda _: 0.9
    assert len(pools.seconds(390)) == 1


def test_an_idle_pool_drains_its_emptiest_host_after_longer_and_not_below_its_minimum() -> None:
    pools = Pools(policy(least=2), cpu=4)
    pools.replicas = {HostId("cpu-2"): 1}
    pools.work["cpu"] = lambda _: 0.4
    first, second = pools.seconds(2000)
    assert 300 <= first[0] <= 310
    assert second[0] - first[0] >= 300
    assert first[1] == DrainHost(
        pool="cpu",
        host=HostId("cpu-2"),
        why="pool cpu has 4 hosts of 3: cpu was 10% busy, and would be 13% with one host less, below its target of "
        "60%, for 300 s; cpu-2 holds 1 replicas",
    )
    assert pools.ready() == 2


@pytest.mark.parametrize("work", [0.1, 0.7, 1.3, 1.9, 2.6, 5.0])
def test_under_steady_load_a_pool_comes_to_rest(work: float) -> None:
    pools = Pools(policy(), cpu=2)
    pools.work["cpu"] = lambda _: work
    pools.seconds(3000)
    assert pools.seconds(3000) == []
    assert work / pools.ready() <= 0.6 or pools.ready() == 4
    assert pools.ready() == 1 or work / (pools.ready() - 1) > 0.5 - 1e-9


def test_a_host_that_dies_is_replaced_at_once() -> None:
    pools = Pools(policy(least=2), cpu=3)
    pools.work["cpu"] = lambda _: 1.2
    pools.seconds(5)
    del pools.hosts["cpu"][HostId("cpu-1")]
    (step,) = pools.seconds(1)
    assert isinstance(step[1], StartHost)


def test_starts_that_fail_are_tried_again_less_and_less_often() -> None:
    pools = Pools(policy(least=2), cpu=2)
    pools.seconds(1)
    del pools.hosts["cpu"][HostId("cpu-1")]
    tried = []
    for _ in range(100):
        for at, step in pools.seconds(1):
            tried.append(at)
            del pools.hosts["cpu"][HostId(f"cpu-{pools.started - 1}")]
            pools.scaler.start_failed(step.pool, at)
    assert [b - a for a, b in pairwise(tried)] == [5, 10, 20, 40]
    pools.scaler.start_succeeded("cpu")


# --- never too few ---------------------------------------------------------------------------------------------------


def test_no_host_leaves_whose_slots_are_needed_to_hold_every_expert() -> None:
    idle = Pools(policy(), cpu=3, slots=4)
    assert len(idle.seconds(3000)) == 1  # two hosts of four slots hold eight experts
    twice = Pools(policy(), cpu=3, slots=6, min_replicas=2)
    assert twice.seconds(3000) == []


def test_pools_grow_beyond_their_minimum_when_they_have_too_few_slots_for_the_model() -> None:
    pools = Pools(policy(), slots=3)
    pools.seconds(60)
    assert pools.ready() == 3
    assert "2 slots are lacking to hold every expert" in pools.steps[-1][1].why


def test_a_pool_empties_itself_when_another_can_take_its_experts_and_its_work() -> None:
    pools = Pools(policy("gpu", most=1), policy("cpu", least=0), gpu=1, cpu=1)
    pools.work["gpu"] = lambda _: 0.3
    pools.work["cpu"] = lambda _: 0.1
    ((_, step),) = pools.seconds(1000)
    assert isinstance(step, DrainHost)
    assert step.pool == "cpu"


@pytest.mark.parametrize(("gpu_busy", "gpu_slots"), [(0.45, 8), (0.1, 7)])
def test_a_pool_does_not_empty_itself_when_no_other_can(gpu_busy: float, gpu_slots: int) -> None:
    pools = Pools(policy("gpu", most=1), policy("cpu", least=0), gpu=1, cpu=1, slots=gpu_slots)
    pools.work["gpu"] = lambda _: gpu_busy
    pools.work["cpu"] = lambda _: 0.1
    assert pools.seconds(1000) == []


def test_an_empty_pool_helps_one_that_is_full_and_too_busy() -> None:
    pools = Pools(policy("gpu", most=1), policy("cpu", least=0), gpu=1)
    pools.work["gpu"] = lambda _: 0.9
    at, step = pools.seconds(60)[0]
    assert (at < 40, step.pool) == (True, "cpu")
    assert "gpu was 90% busy" in step.why


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_a_pool_that_somebody_scaled_stays_so_until_given_back() -> None:
    pools = Pools(policy(), cpu=2)
    pools.seconds(1)
    pools.scaler.scale("cpu", 4, pools.now)
    assert len(pools.seconds(1)) == 2
    assert pools.seconds(3000) == []
    assert pools.ready() == 4
    pools.scaler.auto("cpu")
    pools.seconds(3000)
    assert pools.ready() == 1


def test_a_pool_that_is_scaled_down_drains_one_host_after_the_other() -> None:
    pools = Pools(policy(), cpu=4, takes_s=20)
    pools.seconds(1)
    pools.scaler.scale("cpu", 1, pools.now)
    times = [at for at, step in pools.seconds(100) if isinstance(step, DrainHost)]
    assert len(times) == 3
    assert all(b - a >= 20 for a, b in pairwise(times))


def test_what_cannot_be_is_refused_in_one_line() -> None:
    pools = Pools(policy(), cpu=2, slots=4)
    pools.seconds(1)
    for name, hosts, message in [
        ("tpu", 2, "pool 'tpu': there is none; pools are cpu"),
        ("cpu", 5, "pool cpu cannot have 5 hosts: it may have 1 to 4; change min or max in the config"),
        ("cpu", 0, "pool cpu cannot have 0 hosts: it may have 1 to 4; change min or max in the config"),
        (
            "cpu",
            1,
            "pool cpu cannot have 1 hosts: 4 slots would be lacking to hold every expert 1 times; keep more of them, "
            "or scale another pool up first",
        ),
    ]:
        with pytest.raises(ConfigError) as error:
            pools.scaler.scale(name, hosts, pools.now)
        assert str(error.value) == message
    with pytest.raises(ConfigError, match="there is none"):
        pools.scaler.auto("tpu")


def test_a_pool_that_is_just_being_scaled_is_not_scaled_again_unless_that_hangs() -> None:
    pools = Pools(policy(), cpu=2, takes_s=10_000)
    pools.seconds(1)
    pools.scaler.scale("cpu", 3, pools.now)
    with pytest.raises(BusyError, match=r"^pool cpu is just being scaled to 3 hosts and has 2: ask again when"):
        pools.scaler.scale("cpu", 4, pools.now)
    pools.seconds(2)
    with pytest.raises(BusyError, match="just being scaled"):
        pools.scaler.scale("cpu", 4, pools.now)
    pools.seconds(600)
    pools.scaler.scale("cpu", 2, pools.now)
    ((_, step),) = pools.seconds(1)
    assert step == DrainHost(pool="cpu", host=HostId("cpu-2"), why=step.why)  # the one that never came up


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"least": 3, "most": 2}, "pool cpu: min is 3 and max 2; it must be 0 <= min <= max"),
        ({"least": -1}, "pool cpu: min is -1 and max 4; it must be 0 <= min <= max"),
        ({"target": 1.5}, "pool cpu: target is 1.5 and band 0.1; it must be 0 < band < target <= 1"),
        ({"target": 0.1}, "pool cpu: target is 0.1 and band 0.1; it must be 0 < band < target <= 1"),
    ],
)
def test_policies_that_cannot_be_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        policy(**changes)
    assert str(error.value) == message
