"""How often a refused peer is named in the log."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest

from expertmesh.refusals import EVERY_S, MAX_PEERS, RefusalLog

logger = logging.getLogger("door")


@dataclass
class Clock:
    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return messages


def test_a_peer_is_named_once_a_minute_with_how_often_it_came(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    log = RefusalLog(logger, clock)
    for _ in range(100):
        log.refused("ipv4:10.0.0.1", "wrong token")
        clock.now += EVERY_S / 101
    assert said(caplog) == ["refused ipv4:10.0.0.1: wrong token"]
    clock.now += EVERY_S / 101
    log.refused("ipv4:10.0.0.1", "wrong token")
    assert said(caplog) == ["refused ipv4:10.0.0.1: wrong token (99 times more since it was last said)"]


def test_each_peer_is_named(caplog: pytest.LogCaptureFixture) -> None:
    log = RefusalLog(logger, Clock())
    for peer in ("a", "b", "a", "b"):
        log.refused(peer, "no key")
    assert said(caplog) == ["refused a: no key", "refused b: no key"]


def test_very_many_peers_fill_neither_the_log_nor_memory(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    log = RefusalLog(logger, clock)
    for i in range(5 * MAX_PEERS):
        log.refused(f"peer {i}", "no key")
    assert len(said(caplog)) == len(log._said) == MAX_PEERS
    clock.now += EVERY_S
    log.refused("another", "no key")
    assert said(caplog) == ["refused another: no key"]
    assert len(log._said) == 1
