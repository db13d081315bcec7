"""What `inspect` makes of choices, against figures worked out by hand or by a dumb loop; no model runs."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expertmesh.cli.inspect import parse_layers
from expertmesh.errors import ConfigError
from expertmesh.gates.choices import NO_EXPERT, Choices
from expertmesh.inspect.findings import Findings, LayerFindings, find, measure_confidence
from expertmesh.inspect.page import render_page, visible
from expertmesh.inspect.palette import heat_class, side_class
from expertmesh.inspect.summary import summarize
from expertmesh.inspect.texts import read_domains
from expertmesh.inspect.twins import closest_pairs
from expertmesh.inspect.typical import PRIOR, count_by_token
from expertmesh.inspect.watch import Reading

E = 6


class Letters:
    """A codec whose token n is the n-th letter."""

    def token_text(self, token_id: int) -> str:
        return chr(ord("a") + token_id)

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(map(self.token_text, ids))


def choices(*rows: tuple[int, ...], weights: tuple[tuple[float, ...], ...] | None = None) -> Choices:
    index_TK = torch.tensor(rows)
    weights_TK = torch.tensor(weights) if weights else torch.full(index_TK.shape, 0.5)
    return Choices(index_TK=index_TK, weights_TK=weights_TK.masked_fill(index_TK == NO_EXPERT, 0.0))


def reading(domain: str, ids: list[int], layer: Choices) -> Reading:
    return Reading(domain=domain, ids_T=torch.tensor(ids), layers={0: layer})


def found(*readings: Reading) -> LayerFindings:
    return next(find([E], readings, [0], Letters()))


def by_chance(domain: str, seed: int, tokens: int = 400) -> Reading:
    rng = random.Random(seed)
    rows = [tuple(rng.sample(range(E), 2)) for _ in range(tokens)]
    return reading(domain, [rng.randrange(8) for _ in rows], choices(*rows))


def test_domains_count_alike_however_long_they_are():
    long = reading("long", [0] * 30, choices(*[(0, 1)] * 30))
    short = reading("short", [1] * 2, choices(*[(2, 3)] * 2))
    layer = found(long, short)
    assert layer.shares == (0.25, 0.25, 0.25, 0.25, 0.0, 0.0)
    assert layer.dead == (4, 5)
    assert layer.balancedness == pytest.approx((1 / 6) / 0.25)
    assert [use.tokens for use in layer.domains] == [(30, 30, 0, 0, 0, 0), (0, 0, 2, 2, 0, 0)]
    assert [distance.value for distance in layer.distances] == [1.0]
    assert [use.own_share for use in layer.domains] == [1.0, 1.0]


def test_an_expert_is_dead_nearly_dead_or_overloaded_by_its_part_of_an_even_share():
    rows = [(0,)] * 40 + [(1,)] * 1 + [(2,)] * 20 + [(3,)] * 20 + [(4,)] * 20
    layer = found(reading("one", [0] * len(rows), choices(*rows)))
    assert (layer.dead, layer.nearly_dead, layer.overloaded) == ((5,), (1,), (0,))
    assert layer.loads[0] == pytest.approx(40 / 101 * E)


def test_confidence_is_the_first_choices_part_of_the_weights():
    sure = choices((0, 1), (1, 2), (3, NO_EXPERT), weights=((3.0, 1.0), (0.2, 0.2), (0.7, 0.0)))
    confidence = measure_confidence(sure)
    assert confidence.mean == pytest.approx((0.75 + 0.5 + 1.0) / 3)
    assert confidence.low == 0.5
    assert [n for n, share in enumerate(confidence.shares) if share] == [0, 10, 19]
    assert sum(confidence.shares) == pytest.approx(1.0)


def test_with_one_expert_for_each_token_confidence_is_its_weight():
    confidence = measure_confidence(choices((0,), (1,), weights=((0.25,), (0.75,))))
    assert (confidence.mean, confidence.low) == (0.5, 0.0)


def test_experts_that_get_the_same_tokens_at_the_same_places_are_twins():
    rng = random.Random(0)
    rows = [(0, 1) if rng.random() < 0.5 else tuple(rng.sample(range(2, E), 2)) for _ in range(300)]
    layer = choices(*rows)
    pairs = closest_pairs(layer, count_by_token(torch.tensor([rng.randrange(9) for _ in rows]), layer.index_TK, E))
    assert [(pair.experts, pair.is_twin, pair.together) for pair in pairs] == [((0, 1), True, 1.0)]


def test_experts_that_take_turns_at_the_same_kinds_of_token_are_twins():
    rng = random.Random(0)
    ids = [rng.randrange(6) for _ in range(3000)]
    rows = [(rng.choice((0, 1)) if token < 3 else rng.choice((2, 3, 4, 5)),) for token in ids]
    layer = choices(*rows)
    pairs = closest_pairs(layer, count_by_token(torch.tensor(ids), layer.index_TK, E))
    assert {pair.experts for pair in pairs} == {(0, 1), (2, 3), (2, 4), (2, 5), (3, 4), (3, 5), (4, 5)}
    assert all(pair.together == 0.0 and pair.alike >= 0.9 for pair in pairs)


def test_where_there_are_no_twins_the_closest_pair_is_told():
    pairs = found(by_chance("chance", seed=1)).closest
    assert len(pairs) == 1
    assert not pairs[0].is_twin


def test_typical_tokens_are_what_a_loop_over_the_text_finds():
    one, other = by_chance("one", 1), by_chance("other", 2)
    layer = found(one, other)
    ids = [*one.ids_T.tolist(), *other.ids_T.tolist()]
    rows = [*one.layers[0].index_TK.tolist(), *other.layers[0].index_TK.tolist()]
    occurrences = Counter(ids)
    for expert, told in enumerate(layer.typical):
        got = Counter(token for token, row in zip(ids, rows, strict=True) if expert in row)
        base = sum(got.values()) / len(ids)
        shrunk = {token: (got[token] + PRIOR * base) / (occurrences[token] + PRIOR) / base for token in occurrences}
        order = sorted(shrunk, key=lambda token: (-round(shrunk[token], 9), -got[token], token))
        wanted = [token for token in order if shrunk[token] > 1][:6]
        assert [token.token_id for token in told] == wanted
        for token in told:
            assert (token.count, token.occurrences) == (got[token.token_id], occurrences[token.token_id])
            assert token.lift == pytest.approx(token.count / token.occurrences / base)


def test_a_rare_token_comes_after_one_that_is_certain():
    ids = [0] * 50 + [1] * 3 + [2] * 50
    rows = [(0,)] * 53 + [(1,)] * 50
    assert [token.token for token in found(reading("one", ids, choices(*rows))).typical[0]] == ["a", "b"]


def test_a_token_is_shown_where_it_weighs_most():
    weights = ((0.5, 0.5), (0.5, 0.5), (0.9, 0.1), (0.5, 0.5), (0.5, 0.5))
    rows = [(0, 1), (2, 3), (0, 1), (0, 1), (4, 5)]
    place = found(reading("one", [0, 1, 0, 0, 2], choices(*rows, weights=weights))).typical[0][0]
    assert (place.domain, place.before, place.token, place.after) == ("one", "ab", "a", "ac")


def test_a_dead_layer_end_and_a_token_without_experts_do_no_harm():
    rows = [(0, NO_EXPERT), (NO_EXPERT, NO_EXPERT), (1, 0)]
    layer = found(reading("one", [0, 1, 2], choices(*rows)))
    assert layer.domains[0].tokens == (2, 1, 0, 0, 0, 0)
    render_page(Findings(model="m", tokens={"one": 3}, layers=(layer,)))


def test_little_text_is_said_to_be_little():
    few = Findings(model="m", tokens={"one": 40}, layers=(found(by_chance("one", 1, tokens=40)),))
    many = Findings(model="m", tokens={"one": 400}, layers=(found(by_chance("one", 1)),))
    assert (few.is_enough, many.is_enough) == (False, True)
    assert any("Little text" in point.text for point in summarize(few))
    assert not any("Little text" in point.text for point in summarize(many))


def test_the_summary_worries_about_what_is_wrong():
    rows = [(0, 1)] * 200
    collapsed = Findings(model="m", tokens={"one": 200}, layers=(found(reading("one", [0] * 200, choices(*rows))),))
    worries = " ".join(point.text for point in summarize(collapsed) if point.is_worry)
    assert "Of 6 experts 4 never fired" in worries
    assert "2 experts get twice an even share" in worries
    assert "1 pair of experts" in worries
    assert "Balancedness is 0.33" in worries
    even = Findings(model="m", tokens={"one": 4000}, layers=(found(by_chance("one", 1, tokens=4000)),))
    assert not any(point.is_worry for point in summarize(even))


def test_names_and_tokens_never_become_markup():
    evil = "<script>alert(1)</script>"
    layer = found(by_chance(evil, 1), by_chance("other", 2))
    token = replace(layer.typical[0][0], token=evil, before=evil, after=evil)
    layer = replace(layer, typical=((token,), *layer.typical[1:]))
    page = render_page(Findings(model=evil, tokens={evil: 400, "other": 400}, layers=(layer,)))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 5


def test_blanks_of_a_token_can_be_seen():
    assert visible(" the\n\t\x07") == "·the↵⇥\\x07"


def test_colors_go_from_nothing_to_three_even_shares_and_from_side_to_side():
    assert [heat_class(load) for load in (0.0, 1.0, 3.0, 9.0)] == ["none", "h4", "h12", "h12"]
    assert [side_class(much) for much in (-9.0, 0.0, 9.0)] == ["v0", "v6", "v12"]


def test_layers_are_numbers_and_ranges():
    assert parse_layers("", 3) == [0, 1, 2]
    assert parse_layers("0, 2-3,3", 4) == [0, 2, 3]


@pytest.mark.parametrize("text", ["x", "1-", "-1", "0,,1", "4", "2-4", "3-2", "0-99999999999"])
def test_layers_that_there_are_not_are_refused(text: str):
    with pytest.raises(ConfigError, match="--layers"):
        parse_layers(text, 4)


def test_a_folder_is_a_domain_with_a_document_for_each_file(tmp_path: Path):
    folder = tmp_path / "code"
    (folder / "deeper").mkdir(parents=True)
    for name, text in (("b.py", "two"), ("a.py", "\ufeffone"), (".hidden", "no"), ("deeper/c.py", "no")):
        (folder / name).write_text(text, encoding="utf-8")
    (tmp_path / "prose.txt").write_text("three", encoding="utf-8")
    domains = read_domains([folder, tmp_path / "prose.txt"])
    assert [(domain.name, domain.documents) for domain in domains] == [("code", ("one", "two")), ("prose", ("three",))]
