"""What keeps experts in use while gates are learned: `expertmesh.train.balance`, and the comparison in `trial`."""

from __future__ import annotations

import json
import math
import sys
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from expertmesh.errors import ConfigError
from expertmesh.models import DOMAINS, heldout, tiny_path
from expertmesh.train import __main__ as command
from expertmesh.train import data, sources, trial
from expertmesh.train.balance import BALANCES, Balance, balance_named, fitted, steer
from expertmesh.train.model import new_model, trial_config
from expertmesh.train.sources import Corpus, Document

VOCAB = 32
EXPERTS = 16
K = 2


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_model(seed=0):
    """With gates that are sure enough for their load to be uneven."""
    model = new_model(trial_config(vocab_size=VOCAB), seed=seed)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data *= 20
    return model


def some_tokens(seed=0, windows=3, length=40):
    return torch.randint(VOCAB, (windows, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


# --- how gates are steered -------------------------------------------------------------------------------------------


def test_without_a_balance_the_model_answers_as_by_itself_and_its_load_is_that_of_its_own_gates():
    model, ids = small_model(), some_tokens()
    with torch.no_grad():
        alone = model(input_ids=ids, use_cache=False, output_router_logits=True)
    with steer(model, Balance()) as gates:
        torch.testing.assert_close(logits(model, ids), alone.logits)
        chosen = [layer.topk(K, dim=-1).indices.flatten() for layer in alone.router_logits]
        assert torch.equal(gates.tokens_LE(), torch.stack([one.bincount(minlength=EXPERTS) for one in chosen]))


@pytest.mark.parametrize("name", BALANCES)
def test_afterwards_the_model_is_a_plain_one_again(name):
    model, ids = small_model(), some_tokens()
    alone = logits(model.eval(), ids)
    with steer(model, BALANCES[name]) as gates:
        gates.bias_LE += torch.arange(EXPERTS)
        logits(model.train(), ids)
    torch.testing.assert_close(logits(model.eval(), ids), alone)
    assert model.state_dict().keys() == small_model().state_dict().keys()


def test_the_penalty_is_the_mean_over_layers_of_what_transformers_computes_for_each():
    model, ids = small_model(), some_tokens()
    with torch.no_grad():
        layers = model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
    with steer(model, Balance(aux=0.5, z=0.25)) as gates:
        logits(model.train(), ids)
        aux = sum(load_balancing_loss_func((one,), EXPERTS, K) / K for one in layers) / len(layers)
        z = sum(one.exp().sum(dim=-1).log().square().mean() for one in layers) / len(layers)
        assert gates.penalty().item() == pytest.approx(0.5 * aux.item() + 0.25 * z.item(), rel=1e-5)


@pytest.mark.parametrize(("name", "has_gradient"), [(name, name.startswith("aux")) for name in BALANCES])
def test_losses_reach_the_gates_by_their_gradient_and_the_other_ways_leave_none(name, has_gradient):
    model, ids = small_model().train(), some_tokens()
    with steer(model, BALANCES[name]) as gates:
        model(input_ids=ids, use_cache=False)
        assert gates.penalty().requires_grad == has_gradient
        if has_gradient:
            gates.penalty().backward()
            assert all(gate.weight.grad.abs().max() > 0 for gate in gates.modules)


def test_a_small_step_against_the_gradient_of_the_penalty_lowers_it():
    model, ids = small_model().train(), some_tokens()
    with steer(model, Balance(aux=1.0, z=0.1)) as gates:
        model(input_ids=ids, use_cache=False)
        before = gates.penalty()
        before.backward()
        with torch.no_grad():
            for gate in gates.modules:
                gate.weight -= 1e-3 * gate.weight.grad
        model(input_ids=ids, use_cache=False)
        assert gates.penalty() < before


def test_the_bias_moves_up_where_load_is_below_the_mean_and_down_where_it_is_above():
    model, ids = small_model(), some_tokens()
    with steer(model, Balance(bias_rate=0.125)) as gates:
        logits(model.train(), ids)
        tokens_LE = gates.tokens_LE()
        gates.move_bias()
        mean = ids.numel() * K / EXPERTS
        expected = [[0.125 * ((n < mean) - (n > mean)) for n in layer] for layer in tokens_LE.tolist()]
        assert gates.bias_LE.tolist() == expected
        gates.move_bias()
        assert gates.bias_LE.tolist() == [[2 * value for value in layer] for layer in expected]


def test_only_the_balance_that_has_a_bias_moves_one():
    for name in BALANCES:
        model = small_model()
        with steer(model, BALANCES[name]) as gates:
            logits(model.train(), some_tokens())
            gates.move_bias()
            assert bool(gates.bias_LE.any()) == (name == "bias")


def test_the_bias_selects_and_does_not_weigh():
    """An expert that a bias forces on every token answers with the weight that its own probability gives it."""
    model, ids = small_model().eval(), some_tokens()
    seen = {}
    with steer(model, BALANCES["bias"]) as gates:
        gates.bias_LE[:, 3] = 10.0
        model.model.layers[0].mlp.gate.register_forward_hook(lambda gate, args, output: seen.update(output=output))
        logits(model, ids)
        assert gates.tokens_LE()[:, 3].tolist() == [ids.numel()] * 2
    logits_TE, weights_TK, index_TK = seen["output"]
    assert (index_TK[:, 0] == 3).all()
    own_TK = logits_TE.softmax(dim=-1).gather(1, index_TK)
    torch.testing.assert_close(weights_TK, own_TK / own_TK.sum(dim=-1, keepdim=True))


def test_where_experts_choose_each_takes_its_best_tokens_of_the_batch_and_their_rows_add_up():
    model, ids = small_model().train(), some_tokens(windows=4)
    taken = {}
    block = model.model.layers[1].mlp
    block.register_forward_hook(lambda module, args, output: taken.update(x=args[0], y=output))
    with steer(model, BALANCES["expert-choice"]) as gates:
        logits(model, ids)
        assert gates.tokens_LE().tolist() == [[4 * 40 * K // EXPERTS] * EXPERTS] * 2
    x_TH = taken["x"].flatten(0, 1)
    probs_TE = torch.softmax(x_TH @ block.gate.weight.T, dim=-1)
    y_TH = torch.zeros_like(x_TH)
    for expert in range(EXPERTS):
        for token in probs_TE[:, expert].topk(4 * 40 * K // EXPERTS).indices.tolist():
            gate, up = (block.experts.gate_up_proj[expert] @ x_TH[token]).chunk(2)
            row_H = block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            y_TH[token] += probs_TE[token, expert] * row_H
    torch.testing.assert_close(taken["y"].flatten(0, 1), y_TH, atol=1e-6, rtol=1e-4)


def test_where_experts_choose_training_sees_the_future_and_serving_does_not():
    model, ids = small_model(), some_tokens()
    other = ids.clone()
    other[:, -8:] = (other[:, -8:] + 7) % VOCAB
    with steer(model, BALANCES["expert-choice"]):
        model.train()
        assert not torch.allclose(logits(model, ids)[:, :-8], logits(model, other)[:, :-8], atol=1e-4)
        model.eval()
        torch.testing.assert_close(logits(model, ids)[:, :-8], logits(model, other)[:, :-8])


def test_only_where_experts_choose_weights_are_left_as_probabilities():
    own = trial_config(vocab_size=VOCAB)
    assert {name: fitted(own, BALANCES[name]).norm_topk_prob for name in BALANCES} == {
        "none": True, "aux": True, "aux+z": True, "bias": True, "expert-choice": False,
    }  # fmt: skip
    assert own.norm_topk_prob


def test_an_unknown_balance_is_told_what_there_is():
    with pytest.raises(
        ConfigError, match=r"'auxz' is unknown: did you mean aux\+z\? There are none, aux, aux\+z, bias"
    ):
        balance_named("auxz")


# --- the comparison --------------------------------------------------------------------------------------------------


@cache
def small_text():
    tokenizer = Tokenizer.from_file(str(tiny_path() / "tokenizer.json"))
    streams = tuple(data.encode([heldout(domain)], tokenizer, end=0) for domain in DOMAINS)
    return trial.Text(train_N=streams, heldout_N=streams)


def short(steps=3, seed=0):
    return trial.Trial(
        steps=steps, seed=seed, windows=1, window=32, steps_between_points=2, probe_batches=2, heldout_batches=3
    )


def outcome(name, **terms):
    return trial.run(small_text(), short(**terms), name, told=lambda step: None)


@pytest.mark.parametrize("name", BALANCES)
def test_every_balance_trains_and_says_what_became_of_it(name):
    steps = []
    sides = trial.run(small_text(), short(), name, told=steps.append)
    assert [step.number for step in steps] == [1, 2, 3]
    assert all((step.penalty > 0) == name.startswith("aux") for step in steps)
    assert list(sides) == ([name, f"{name}, as served"] if name == "expert-choice" else [name])
    for side in sides.values():
        curve = side["curve"]
        assert curve["tokens"] == [0, 192, 288]
        assert curve["loss"][0] == pytest.approx(math.log(3072), abs=0.3)
        assert all(len(layers) == 2 for layers in curve["balancedness"] + curve["dead"])
        assert all(1 / EXPERTS <= value <= 1 for value in side["heldout"]["balancedness"])


def test_the_same_seed_gives_the_same_outcome_and_another_seed_another():
    once, again, other = (outcome("bias", steps=2, seed=seed) for seed in (1, 1, 2))
    assert once == again
    assert once != other


def test_all_balances_start_from_the_same_model_and_read_the_same_batches():
    first_losses = {}
    for name in ("none", "aux", "aux+z", "bias"):
        trial.run(
            small_text(), short(steps=1), name, told=lambda step, name=name: first_losses.update({name: step.loss})
        )
    assert len(set(first_losses.values())) == 1


def test_an_expert_counts_as_dead_at_a_tenth_of_an_even_share():
    evaluation = trial.Evaluation(loss=1.0, tokens=40, load_LE=torch.tensor([[35, 1, 2, 2], [10, 10, 10, 10]]))
    assert trial.figures(evaluation) == {"loss": 1.0, "balancedness": [round(10 / 35, 4), 1.0], "dead": [1, 0]}


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def train_command(monkeypatch, capsys):
    """Runs `python -m expertmesh.train ...` in this process: its exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            command.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--balance", "even"], "balance 'even' is unknown: did you mean none?"),
        (["--balance", "none"], "holds the model that ships, which has the balance aux: name another folder"),
        (["compare", "--out", "x.json", "--balance", "even"], "balance 'even' is unknown"),
        (["compare", "--out", "nowhere/x.json"], "out: nowhere/x.json cannot be written; name a file in a folder"),
        (["compare", "--out", "x.json", "--picture", "x.doc"], "picture: x.doc: the ending says no kind of picture"),
    ],
)
def test_what_cannot_work_is_one_clear_line_before_anything_is_fetched(arguments, message, train_command, monkeypatch):
    monkeypatch.setenv("PATH", "")  # without apt-get, a fetch would be refused in other words
    code, out, err = train_command(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def pages(domain):
    """Text enough for a split with a held-out part of more than a window."""
    text = heldout(domain)
    return tuple(
        Document(name=f"{start} {turn}", text=text[start : start + 2000])
        for start in range(0, len(text), 2000)
        for turn in range(8)
    )


def test_one_command_writes_the_report_and_the_picture(train_command, monkeypatch, tmp_path):
    corpora = tuple(Corpus(domain=domain, documents=pages(domain), source="here", licence="") for domain in DOMAINS)
    monkeypatch.setattr(sources, "fetch", lambda cache: corpora)
    out, picture = tmp_path / "balance.json", tmp_path / "balance.svg"
    code, table, _ = train_command(
        "compare", "--out", out, "--picture", picture, "--balance", "none", "--steps", 2, "--seed", 5
    )
    assert code == 0
    report = json.loads(out.read_text())
    assert report["command"] == "python -m expertmesh.train compare --steps 2 --seed 5 --balance none"
    assert report["versions"]["torch"] == torch.__version__
    assert {"commit", "cpu", "threads", "corpora"} <= report.keys()
    assert report["trial"]["seed"] == 5
    assert report["balances"] == {"none": {"aux": 0.0, "z": 0.0, "bias_rate": 0.0, "experts_choose": False}}
    assert list(report["sides"]) == ["none"]
    assert report["sides"]["none"]["curve"]["tokens"] == [0, 2 * 768]
    assert f"{report['sides']['none']['heldout']['loss']:.3f}" in table
    assert picture.read_text().count("<path") > 10
