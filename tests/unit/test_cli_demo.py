"""What the demo measures with, on its own: the steady load, and what two looks at a mesh add up to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import httpx
import pytest

from expertmesh.cli.demo import Story
from expertmesh.cli.reading import gained_and_lost, imbalance_if_unchanged, is_calm, only_replicas
from expertmesh.cli.steady import TOKENS, Outcome, SteadyLoad, ask, unlike
from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.ids import ExpertId, HostId
from expertmesh.placement import HostInfo, Placement

PROMPTS = ("one", "two")


def sse(*chunks: str) -> bytes:
    return b"".join(f"data: {chunk}\n\n".encode() for chunk in (*chunks, "[DONE]"))


def chunk(*token_ids: int) -> str:
    return f'{{"choices": [{{"text": "", "token_ids": {list(token_ids)}}}]}}'


def asked(answer: Callable[[httpx.Request], httpx.Response]) -> Outcome:
    outcome = Outcome(prompt="one")
    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        ask(client, "http://mesh", outcome, SYSTEM_CLOCK)
    return outcome


def test_an_answer_is_its_token_ids():
    outcome = asked(lambda _: httpx.Response(200, content=sse(chunk(1, 2), chunk(*range(3, TOKENS + 1)))))
    assert (outcome.token_ids, outcome.error) == (list(range(1, TOKENS + 1)), "")
    assert outcome.longest_wait_s > 0


@pytest.mark.parametrize(
    ("status", "content", "error"),
    [
        (503, b'{"error": {"message": "no host can serve expert 0:1 now"}}', "no host can serve expert 0:1 now"),
        (200, sse(chunk(1), '{"error": {"message": "the mesh took too long"}}'), "the mesh took too long"),
        (200, sse(chunk(1), chunk(2)), "it ended after 2 tokens"),
        (200, b"data: {", "Expecting property name"),
    ],
)
def test_whatever_goes_wrong_is_a_failure(status: int, content: bytes, error: str):
    assert error in asked(lambda _: httpx.Response(status, content=content)).error


def test_a_broken_connection_is_a_failure():
    def broken(_: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("connection reset")

    assert asked(broken).error == "connection reset"


def test_an_answer_with_another_token_is_found():
    references = {"one": [1, 2], "two": [3, 4]}
    same, other = Outcome(prompt="one", token_ids=[1, 2]), Outcome(prompt="two", token_ids=[3, 5])
    failed = Outcome(prompt="two", token_ids=[3], error="gone")
    assert unlike([same, other, failed], references) == [other]


class Gate:
    """Lets tokens out of a mesh: some, or all."""

    def __init__(self) -> None:
        self._left = threading.Semaphore(0)
        self._is_open = threading.Event()

    def wait(self) -> None:
        if not self._is_open.is_set():
            self._left.acquire()

    def let_out(self, tokens: int) -> None:
        self._left.release(tokens)

    def open(self) -> None:
        self._is_open.set()
        self._left.release(10)  # for those who wait already


@pytest.fixture
def gate(monkeypatch) -> Iterator[Gate]:
    """Of the mesh that all clients talk to."""
    gate = Gate()

    class Slow(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            for token in range(TOKENS):
                gate.wait()
                yield f"data: {chunk(token)}\n\n".encode()

    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=Slow()))
    real = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **options: real(transport=transport, **options))
    yield gate
    gate.open()


def wait_until(condition: Callable[[], bool]) -> None:
    pause, deadline = threading.Event(), SYSTEM_CLOCK.monotonic() + 10
    while not condition():
        assert SYSTEM_CLOCK.monotonic() < deadline
        pause.wait(0.01)


def test_a_strike_marks_what_is_streaming_and_nothing_else(gate):
    with SteadyLoad("http://mesh", PROMPTS, clients=2, clock=SYSTEM_CLOCK) as load:
        assert load.strike() == 0  # nobody has a token yet
        gate.let_out(5)
        wait_until(lambda: load.num_streaming >= 1)
        hit = load.strike()
        assert 1 <= hit <= 2
        gate.open()
        wait_until(lambda: len(load.outcomes) >= 4)
    assert sum(outcome.was_struck for outcome in load.outcomes) == hit
    assert not any(outcome.error for outcome in load.outcomes)


def test_a_load_turns_to_other_prompts_and_loses_no_request(gate):
    gate.open()
    with SteadyLoad("http://mesh", PROMPTS, clients=2, clock=SYSTEM_CLOCK) as load:
        wait_until(lambda: len(load.outcomes) >= 4)
        assert {outcome.prompt for outcome in load.outcomes} == set(PROMPTS)
        load.turn_to(["three"])
        wait_until(lambda: load.outcomes[-1].prompt == "three")
    assert load.num_streaming == 0
    assert load.outcomes[-1].prompt == "three"


def test_a_check_that_fails_is_counted_and_shown(capsys):
    story = Story("http://mesh")
    story.check(True, "this holds")
    assert story.num_failed == 0
    story.check_answers([Outcome(prompt="x", error="no host")], "these")
    assert (story.num_checks, story.num_failed) == (3, 1)
    out = capsys.readouterr().out
    assert "✓ this holds" in out
    assert "✗ not so: none of these failed (1 did: no host)" in out


# --- two looks at a mesh ---------------------------------------------------------------------------------------------


def look(loads: list[float], **holders: str) -> dict:
    """A mesh of hosts "a" and "b" and one layer; `holders` such as e0="ab"."""
    placement = Placement(
        epoch=1,
        hosts=tuple(HostInfo(id=HostId(host), address="-") for host in "ab"),
        num_experts=(len(loads),),
        replicas={ExpertId(0, int(name[1:])): tuple(map(HostId, hosts)) for name, hosts in holders.items()},
    )
    return {
        "hosts": [{"id": host, "rate": 100.0} for host in "ab"],
        "placement": placement.to_json(),
        "load": {"per_second": [loads], "imbalance_of_layers": [1.0]},
        "moves": {"moves": []},
    }


BEFORE = look([1.0, 9.0, 1.0, 1.0], e0="a", e1="ab", e2="b", e3="b")
AFTER = look([1.0, 1.0, 9.0, 1.0], e0="a", e1="a", e2="ab", e3="b")


def test_experts_that_gained_and_lost_replicas():
    assert gained_and_lost(BEFORE, AFTER) == ([(0, 2)], [(0, 1)])
    assert gained_and_lost(BEFORE, BEFORE) == ([], [])


def test_what_a_placement_would_be_worth_had_it_stayed():
    # As it was, b alone holds 2 and 3, and carries 10 of 12 where 6 is ideal.
    assert imbalance_if_unchanged(BEFORE, AFTER) == [pytest.approx(10 / 6)]
    assert imbalance_if_unchanged(AFTER, AFTER) == [pytest.approx(1.0)]


def test_replicas_that_are_the_only_ones():
    assert only_replicas(BEFORE["placement"]) == {"a": 1, "b": 2}


def test_a_mesh_is_calm_when_nothing_moves_and_every_layer_is_level():
    assert is_calm(AFTER)
    assert not is_calm(AFTER | {"moves": {"moves": [{"what": "loading"}]}})
    assert not is_calm(AFTER | {"load": {"imbalance_of_layers": [1.0, None, 1.2]}})
