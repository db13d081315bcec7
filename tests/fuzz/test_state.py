"""What controllers leave for one another, and what attached models read of a mesh, is valid or refused."""

from __future__ import annotations

import json

from hypothesis import example, given
from hypothesis import strategies as st

from expertmesh.control.note import Memory, Note, Size
from expertmesh.errors import ConfigError, ProtocolError
from expertmesh.ids import ExpertId, HostId
from expertmesh.placement import Placement
from expertmesh.testing.experts import Mixture
from tests.fuzz.fuzzing import altered, at_most, damaged, fuzzed, outcome, values
from tests.fuzz.messages import MIXTURE

NOTE = Note(
    epoch=7,
    replicas={ExpertId(0, 1): (HostId("cpu-1"), HostId("cpu-2")), ExpertId(1, 0): ()},
    memory=Memory(
        named={"cpu": 3},
        sizes={"cpu": Size(hosts=2, is_manual=True)},
        standby=frozenset({HostId("cpu-3")}),
        doubted=frozenset({(ExpertId(0, 1), HostId("cpu-1"))}),
    ),
)
HELD = {"a": [ExpertId(0, 0), ExpertId(0, 1)], "b": [ExpertId(0, 1), ExpertId(1, 3)]}
PLACEMENT = Mixture(MIXTURE.spec, 2, 4).placement(HELD).to_json()
ROOM = 2**20


def check_note(data: bytes) -> None:
    with at_most(ROOM + 100 * len(data)):
        note = outcome(lambda: Note.from_bytes(data), ConfigError)
    if isinstance(note, Note):
        assert Note.from_bytes(note.to_bytes()) == note
        assert note.epoch >= 0
        assert all(isinstance(host, str) for hosts in note.replicas.values() for host in hosts)


@fuzzed(200)
@given(altered(json.loads(NOTE.to_bytes())) | values)
def test_any_note_is_followed_or_refused(value) -> None:
    check_note(json.dumps(value).encode())


@fuzzed(200)
@given(damaged(NOTE.to_bytes()) | st.binary(min_size=1, max_size=30))
@example(b"[" * 50_000)
@example(b"\x00")
def test_a_damaged_note_is_followed_or_refused(data) -> None:
    check_note(data)


@fuzzed(200)
@given(altered(PLACEMENT) | values)
@example({"epoch": 1, "num_experts": [10**12], "hosts": []})
@example({"epoch": 1, "num_experts": [1] * 5000, "hosts": []})
def test_any_placement_is_one_or_refused(value) -> None:
    with at_most(ROOM):
        placement = outcome(lambda: Placement.from_json(value), ProtocolError)
    if isinstance(placement, Placement):
        if sum(placement.num_experts) > 10_000:
            return
        assert len(placement.layers) == len(placement.num_experts)
        assert Placement.from_json(json.loads(json.dumps(placement.to_json()))) == placement
        assert all(table.host_EM.max(initial=0) < max(1, len(placement.hosts)) for table in placement.layers)
