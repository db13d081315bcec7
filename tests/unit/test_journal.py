"""The decision log."""

from __future__ import annotations

from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.control.journal import KEPT, Journal


def test_the_same_again_is_counted_and_shows_what_is_known_now() -> None:
    journal = Journal(SYSTEM_CLOCK)
    for epoch in (3, 4, 5):
        journal.add("publish", "hosts are as fast as measured", epoch=epoch)
    journal.add("publish", "a replica was added", epoch=6)
    first, second = journal.entries()
    assert (first["epoch"], first["times"]) == (5, 3)
    assert (second["epoch"], second.get("times")) == (6, None)


def test_the_oldest_are_forgotten() -> None:
    journal = Journal(SYSTEM_CLOCK)
    for number in range(KEPT + 5):
        journal.add("load", f"for the {number}th reason")
    entries = journal.entries()
    assert len(entries) == KEPT
    assert entries[0]["why"] == "for the 5th reason"
