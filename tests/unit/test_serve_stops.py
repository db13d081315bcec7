"""Stop strings, against a dumb reference that looks at one character at a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from expertmesh.serve.stops import StopMatcher

stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)
chunks = st.lists(st.text("abc", max_size=5), max_size=12)


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Text before the stop string that is complete first, the longest if several are complete at once."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(chunks: list[str], stops: list[str], *, include: bool = False) -> tuple[str, str | None]:
    matcher, shown = StopMatcher(stops, include=include), ""
    for chunk in chunks:
        shown += matcher.push(chunk)
        if matcher.matched:
            return shown, matcher.matched
    return shown + matcher.flush(), None


@given(chunks=chunks, stops=stops)
def test_however_text_is_cut_it_ends_where_characters_one_by_one_would_end_it(chunks, stops):
    assert run(chunks, stops) == reference("".join(chunks), stops)


@given(chunks=chunks, stops=stops)
def test_nothing_is_held_back_that_cannot_begin_a_stop_string(chunks, stops):
    matcher, shown = StopMatcher(stops), ""
    for i, chunk in enumerate(chunks):
        shown += matcher.push(chunk)
        if matcher.matched:
            return
        held = "".join(chunks[: i + 1]).removeprefix(shown)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_the_stop_string_itself_is_shown_only_on_request():
    assert run(["one TW", "O three"], ["TWO"]) == ("one ", "TWO")
    assert run(["one TW", "O three"], ["TWO"], include=True) == ("one TWO", "TWO")


def test_text_that_only_looked_like_a_stop_string_comes_out_at_the_end():
    assert run(["one TW"], ["TWO"]) == ("one TW", None)
