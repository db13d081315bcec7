"""What the fuzz tests share: how many examples they run, how valid inputs are damaged, and how memory is watched.

The same inputs come every time, so that CI is never red by chance. To look for new ones, for as long as there is time:

    EXPERTMESH_FUZZ_EXAMPLES=20000 pytest tests/fuzz
"""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from expertmesh.errors import ExpertMeshError

WANTED = int(os.environ.get("EXPERTMESH_FUZZ_EXAMPLES", "0"))
"""Examples of every test; 0 runs each test's own number of them, the same ones every time."""

EDGES = (0, 1, 2, 3, 4, 7, 8, 255, 256, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63)
"""Numbers at which something usually ends."""


def fuzzed(examples: int) -> settings:
    """The settings of a fuzz test."""
    return settings(
        max_examples=WANTED or examples,
        derandomize=not WANTED,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def edges(most: int) -> st.SearchStrategy[int]:
    """Integers from 0 to `most`, the small ones and those at edges more often."""
    return st.one_of(st.integers(0, 8), st.sampled_from([edge for edge in EDGES if edge <= most]), st.integers(0, most))


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with bytes changed, cut out, repeated, or replaced by lengths that lie."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 5)):
            case 0:
                data = data[:at]
            case 1:
                data = data[:at] + draw(st.binary(max_size=12)) + data[at:]
            case 2:
                data = data[:at] + data[at + draw(st.integers(1, 16)) :]
            case 3:
                end = at + draw(st.integers(1, 64))
                data = data[:end] + data[at:end] * draw(st.integers(1, 8)) + data[end:]
            case 4:
                size = draw(st.sampled_from([1, 2, 4, 8]))
                number = draw(edges(256**size - 1))
                order = draw(st.sampled_from(["little", "big"]))
                data = data[:at] + number.to_bytes(size, order) + data[at + size :]
            case 5:
                data = data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    return data


numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([*EDGES, -(2**31), -(2**63), 10**18, 10**400, -(10**400)]),
    st.floats(),
)
texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "a\nb", "\x00", "\x1b[2J", "../../etc/passwd", "/etc/passwd", "~root", "x" * 300, "١", "-1"]
    ),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)
"""Anything that JSON, and more than YAML, can say."""


def places(value: Any) -> list[tuple[Any, ...]]:
    """The path of everything within `value`, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(), *((key, *rest) for key, of in inner for rest in places(of))]


@st.composite
def altered(draw: st.DrawFn, value: Any, among: st.SearchStrategy[Any] = values) -> Any:
    """A valid `value` in which a few parts are replaced, left out, repeated or joined by others."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(among)
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        match draw(st.integers(0, 4)):
            case 0 | 1:
                holder[path[-1]] = draw(among)
            case 2:
                del holder[path[-1]]
            case 3 if isinstance(holder, dict):
                holder[draw(texts)] = draw(among)
            case _ if isinstance(holder, list):
                holder.append(draw(st.sampled_from([*holder, draw(among)])))
            case _:
                holder[path[-1]] = draw(numbers)
    return value


def outcome(attempt: Callable[[], Any], *kinds: type[ExpertMeshError]) -> Any:
    """What `attempt` returned, or the error that it raised, which must be one of `kinds` and of one line."""
    try:
        return attempt()
    except kinds as error:
        line = str(error)
        assert line.isprintable(), line[:300]
        assert len(line) < 2000, line[:300]
        return error


@contextmanager
def at_most(num_bytes: float) -> Iterator[None]:
    """Fails when more is allocated within, at any moment, than `num_bytes`."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= num_bytes, f"{peak:,} bytes were allocated, {num_bytes:,} are allowed"
