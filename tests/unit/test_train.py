"""The training of the tiny model, and the tiny model that ships: `expertmesh.train` and `expertmesh.models`."""

from __future__ import annotations

import json
import math
from functools import cache
from itertools import combinations, islice
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertmesh.errors import ConfigError
from expertmesh.models import DOMAINS, PROMPTS, heldout, tiny_path
from expertmesh.train import data, loop, report, sources
from expertmesh.train.balance import Balance, steer
from expertmesh.train.budget import TimeBudget, TokenBudget
from expertmesh.train.model import END_OF_TEXT_ID, WINDOW, new_model, tiny_config
from expertmesh.train.sources import Corpus, Document
from expertmesh.train.tokenizer import train_tokenizer


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- sources ---------------------------------------------------------------------------------------------------------

DUMP = """\
00-database-info
    n 1: about the database itself
.22 caliber
    adj 1: of a gun; "a .22
           pistol" [syn: {.22 caliber}, {.22 calibre}]
.22 calibre
    adj 1: of a gun; "a .22 pistol" [syn: {.22 caliber}]
trident
    n 1: a spear with three
         prongs
    2: of a gun; "a .22 pistol"
    v 1: to spear
"""


def test_a_sense_is_kept_only_where_it_is_first_met_and_on_one_line():
    assert sources.dictionary_entries(DUMP) == [
        '.22 caliber\n    adj 1: of a gun; "a .22 pistol" [syn: {.22 caliber}, {.22 calibre}]\n',
        "trident\n    n 1: a spear with three prongs\n    v 1: to spear\n",
    ]


@given(st.lists(st.integers(min_value=1, max_value=3 * sources.PAGE_CHARS), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_pages_hold_every_entry_once_in_order(lengths):
    entries = [f"{number}\n" + "x" * length + "\n" for number, length in enumerate(lengths)]
    pages = sources.pages(entries)
    assert "".join(page.text for page in pages) == "".join(entries)
    assert all(len(page.text) >= sources.PAGE_CHARS for page in pages[:-1])


def test_the_python_corpus_is_the_library_without_tests_and_without_this_machines_paths():
    names = {document.name for document in sources.python().documents}
    assert {"dataclasses.py", "json/decoder.py"} <= names
    assert not [name for name in names if name.startswith(("test/", "site-packages/", "config-", "_sysconfigdata"))]


def test_a_machine_without_apt_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="apt-get was not found"):
        sources.debian_package("dict-wn", tmp_path / "cache")


# --- data ------------------------------------------------------------------------------------------------------------


def corpus(names):
    documents = tuple(Document(name=name, text=f"text of {name}") for name in names)
    return Corpus(domain="d", documents=documents, source="", licence="")


@given(st.lists(st.text(max_size=8), unique=True, max_size=300))
@settings(max_examples=30, deadline=None)
def test_a_split_keeps_every_document_on_exactly_one_side(names):
    split = data.split(corpus(names))
    kept = [document.name for document in split.train + split.heldout]
    assert sorted(kept) == sorted(names)


def test_what_is_held_out_does_not_depend_on_the_other_documents():
    names = [f"chapter {number}" for number in range(2000)]
    whole = {document.name for document in data.split(corpus(names)).heldout}
    part = {document.name for document in data.split(corpus(names[1000:][::-1])).heldout}
    assert part == whole & set(names[1000:])
    assert 0.5 < len(whole) / (data.HELD_OUT_SHARE * len(names)) < 1.5


def test_a_prefix_stops_at_the_first_document_that_reaches_the_size():
    documents = [Document(name=str(number), text="é" * 10) for number in range(9)]
    assert len(data.prefix(documents, 21)) == 2
    assert len(data.prefix(documents, 10_000)) == 9


def test_a_mixed_batch_holds_whole_windows_of_every_stream_in_equal_parts():
    streams = [torch.arange(0, 500), torch.arange(1000, 1300)]
    for batch in islice(data.mixed_batches(streams, windows=3, length=16, seed=1), 20):
        assert batch.shape == (6, 16)
        assert (batch[:, 1:] - batch[:, :-1] == 1).all()
        assert ((batch >= 1000).sum(dim=1) == torch.tensor([0, 0, 0, 16, 16, 16])).all()


def test_the_same_seed_gives_the_same_batches():
    streams = [torch.arange(500)]
    first, again, other = (
        torch.stack(list(islice(data.mixed_batches(streams, windows=2, length=8, seed=seed), 5))) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- tokenizer -------------------------------------------------------------------------------------------------------


@cache
def small_tokenizer():
    return train_tokenizer([PROMPTS["python"] * 20, "In the beginning was the word. " * 20], vocab_size=300)


@given(st.one_of(st.text(), st.binary().map(lambda raw: raw.decode("latin-1"))))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_tokenizer(text):
    tokenizer = small_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_stream_ends_each_text_with_the_end_token():
    tokenizer = small_tokenizer()
    ids = data.encode(["the word", "return"], tokenizer, end=END_OF_TEXT_ID).tolist()
    assert tokenizer.token_to_id("<|endoftext|>") == END_OF_TEXT_ID
    assert ids.count(END_OF_TEXT_ID) == 2
    assert ids[-1] == END_OF_TEXT_ID


# --- loop ------------------------------------------------------------------------------------------------------------


def test_the_rate_warms_up_stays_and_decays_to_nothing():
    schedule = loop.Schedule(peak_rate=2.0, warmup_tokens=100, decay_share=0.4)
    rates = [schedule.rate(seen, 1000) for seen in (0, 50, 100, 600, 700, 1000, 2000)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 2.0, 1.0, 0.0, 0.0])


@given(st.integers(min_value=1, max_value=10**9))
@settings(deadline=None)
def test_a_budget_that_is_set_late_gives_the_rates_of_one_known_from_the_start(seen):
    schedule = loop.Schedule()
    budget = schedule.budget_to_decay_from(seen)
    assert schedule.rate(seen, budget) == schedule.rate(seen, None)
    assert schedule.rate(seen + 3, budget) < schedule.rate(seen + 3, None)


class HandClock:
    """Reads what the test sets."""

    now_s = 0.0

    def monotonic(self):
        return self.now_s

    def wall(self):
        return self.now_s


def test_minutes_become_tokens_once_at_the_start_of_the_decay():
    clock = HandClock()
    budget = TimeBudget(10, schedule=loop.Schedule(decay_share=0.4), clock=clock)
    clock.now_s = 359.0
    assert budget.tokens(5_900) is None
    clock.now_s = 360.0
    assert budget.tokens(6_000) == 10_000
    clock.now_s = 9999.0
    assert budget.tokens(7_000) == 10_000


def test_twenty_steps_lower_the_loss_and_can_be_repeated():
    def losses():
        stream = torch.tensor([(position * position) % 17 for position in range(2000)])
        batches = data.mixed_batches([stream], windows=4, length=48, seed=0)
        model = new_model(tiny_config(vocab_size=32), seed=0)
        schedule = loop.Schedule(warmup_tokens=400)
        with steer(model, Balance(aux=0.01)) as gates:
            steps = loop.train(model, batches, schedule, gates, TokenBudget(20 * 4 * 48))
            return [step.loss for step in steps]

    first = losses()
    assert len(first) == 20
    assert first[0] == pytest.approx(math.log(32), abs=0.3)
    assert first[-1] < 0.6 * first[0]
    assert losses() == first


# --- report ----------------------------------------------------------------------------------------------------------


def use_of(**shares):
    return report.ExpertUse.of({name: SimpleNamespace(load_LE=torch.tensor([load])) for name, load in shares.items()})


def test_domains_that_share_no_expert_are_at_distance_one_and_own_theirs():
    use = use_of(a=[5, 5, 0, 0], b=[0, 0, 1, 1])
    assert use.distance_L("a", "b").tolist() == [1.0]
    assert use.own_share_DL().tolist() == [[1.0], [1.0]]
    assert use.least_share_L().tolist() == [1.0]


def test_domains_that_use_experts_alike_are_at_distance_nothing():
    use = use_of(a=[3, 1, 0, 0], b=[6, 2, 0, 0])
    assert use.distance_L("a", "b").tolist() == [0.0]
    assert use.least_share_L().tolist() == [0.0]


# --- the model that ships --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def account():
    return json.loads((tiny_path() / "training.json").read_text())


@pytest.fixture(scope="module")
def tiny_tokenizer():
    return AutoTokenizer.from_pretrained(tiny_path())


@pytest.fixture(scope="module")
def evaluations(tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32, experts_implementation="grouped_mm")
    return {
        domain: report.evaluate(
            model,
            data.encode([heldout(domain)], tiny_tokenizer.backend_tokenizer, end=END_OF_TEXT_ID),
            window=WINDOW,
        )
        for domain in DOMAINS
    }


def test_the_folder_is_small_and_complete():
    files = {str(path.relative_to(tiny_path())): path for path in tiny_path().rglob("*") if path.is_file()}
    assert sum(path.stat().st_size for path in files.values()) < 16 * 2**20
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "NOTICE"} <= files.keys()
    assert {f"heldout/{domain}.txt" for domain in DOMAINS} <= files.keys()


def test_held_out_loss_is_as_recorded(account, evaluations):
    recorded = {domain: entry["sample_loss"] for domain, entry in account["domains"].items()}
    assert {domain: evaluation.loss for domain, evaluation in evaluations.items()} == pytest.approx(recorded, abs=0.02)


def test_the_model_predicts_far_better_than_chance(account):
    for entry in account["domains"].values():
        assert entry["heldout_bits_per_byte"] < 2.6


def test_no_expert_is_dead(evaluations):
    assert report.ExpertUse.of(evaluations).least_share_L().min() > 0.2


def test_each_pair_of_domains_uses_visibly_different_experts(evaluations):
    use = report.ExpertUse.of(evaluations)
    for one, other in combinations(DOMAINS, 2):
        assert use.distance_L(one, other).mean() > 0.25
    assert use.own_share_DL().mean() > 0.5


def test_the_tokenizer_names_the_end_of_text_that_the_model_stops_at(tiny_tokenizer):
    assert tiny_tokenizer.eos_token_id == END_OF_TEXT_ID
    for domain in DOMAINS:
        assert tiny_tokenizer.decode(tiny_tokenizer(heldout(domain))["input_ids"]) == heldout(domain)


def test_a_chat_is_its_messages_and_the_assistant_goes_on_where_the_user_stopped(tiny_tokenizer):
    messages = [
        {"role": "system", "content": "Old books."},
        {"role": "user", "content": "In the beginning"},
        {"role": "assistant", "content": " was the word."},
        {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "then"}]},
    ]
    rendered = tiny_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "Old books.\nIn the beginning was the word.\nAnd then"


def test_every_domain_has_a_prompt_and_an_unknown_one_is_refused():
    assert tuple(PROMPTS) == DOMAINS
    with pytest.raises(ValueError, match="poetry"):
        heldout("poetry")
