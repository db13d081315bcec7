"""What the controller keeps of what routers say of themselves."""

from __future__ import annotations

from dataclasses import dataclass

from expertmesh.control.routers import Routers

LEASE_S = 30.0


@dataclass
class Clock:
    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        raise AssertionError("ages are no dates")


def test_the_last_word_of_each_router_is_shown_with_its_age():
    clock = Clock()
    routers = Routers(LEASE_S, clock)
    routers.heard("b", {"epoch": 1})
    clock.now += 2
    routers.heard("a", {"epoch": 7, "avoided": ["cpu-0"]})
    clock.now += 1
    assert routers.entries() == [
        {"id": "a", "age_s": 1.0, "epoch": 7, "avoided": ["cpu-0"]},
        {"id": "b", "age_s": 3.0, "epoch": 1},
    ]
    routers.heard("b", {"epoch": 8})
    assert routers.entries()[1] == {"id": "b", "age_s": 0.0, "epoch": 8}


def test_a_router_that_went_silent_is_forgotten_after_its_lease():
    clock = Clock()
    routers = Routers(LEASE_S, clock)
    routers.heard("silent", {})
    clock.now += LEASE_S
    routers.heard("heard", {})
    assert [entry["id"] for entry in routers.entries()] == ["heard", "silent"]
    clock.now += 0.01
    assert [entry["id"] for entry in routers.entries()] == ["heard"]


def test_nothing_is_kept_of_routers_that_come_and_go_while_nobody_looks():
    clock = Clock()
    routers = Routers(LEASE_S, clock)
    for number in range(1000):
        routers.heard(f"router-{number}", {})
        clock.now += 1
    assert len(routers._words) == LEASE_S + 1
