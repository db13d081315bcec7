"""What each balance does to the same model: one side of `compare` at a time.

Owns the terms: one small model, one initialisation and one order of batches for all, so that sides differ in the
balance alone. Does not know terminals, files or pictures. Invariant: the budget is a number of steps, never a time, so
that the same seed gives the same figures again on the same machine and versions.

Shapes: B windows of a batch, T tokens of a window, N tokens of a stream, E experts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from expertmesh.gates.measures import balancedness, is_dead
from expertmesh.models import tiny_path
from expertmesh.train import data, loop
from expertmesh.train.balance import BALANCES, SteeredGates, fitted, steer
from expertmesh.train.budget import TokenBudget
from expertmesh.train.model import END_OF_TEXT_ID, new_model, trial_config
from expertmesh.train.report import Evaluation, evaluate_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import Qwen3MoeConfig

    from expertmesh.train.data import Split

TRAIN_BYTES = 3_000_000
"""Of each domain: more than the default number of steps reads."""
DEAD_SHARE = 0.1
"""An expert counts as dead that gets at most this share of what it would get if load were even."""
AS_SERVED = ", as served"
"""Ends the name of a side whose gate cannot be served as it was trained, and is judged as it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What all sides learn from and what they are judged by, a stream for each domain."""

    train_N: tuple[Tensor, ...]
    heldout_N: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What else all sides share."""

    steps: int = 600
    seed: int = 0
    config: Qwen3MoeConfig = field(default_factory=trial_config)
    windows: int = 2
    """Of each domain in a batch."""
    window: int = 128
    steps_between_points: int = 20
    probe_batches: int = 4
    """Of held-out text, for each point of a curve."""
    heldout_batches: int = 40
    """For the figures at the end."""

    def batch_tokens(self, text: Text) -> int:
        return len(text.train_N) * self.windows * self.window

    def to_json(self, text: Text) -> dict[str, Any]:
        config = self.config
        return {
            "steps": self.steps,
            "seed": self.seed,
            "batch": [len(text.train_N) * self.windows, self.window],
            "schedule": dataclasses.asdict(self.schedule(text)),
            "heldout_tokens": self.heldout_batches * self.batch_tokens(text),
            "probe_tokens": self.probe_batches * self.batch_tokens(text),
            "layers": config.num_hidden_layers,
            "experts": config.num_experts,
            "experts_per_token": config.num_experts_per_tok,
            "weights_sum_to_one": config.norm_topk_prob,
            "hidden_size": config.hidden_size,
            "expert_size": config.moe_intermediate_size,
        }

    def schedule(self, text: Text) -> loop.Schedule:
        """As for the tiny model, but with a warm-up that fits the budget: a twentieth of it."""
        return loop.Schedule(warmup_tokens=max(1, self.steps * self.batch_tokens(text) // 20))


def read(splits: Sequence[Split]) -> Text:
    """The tiny model's data in the tiny model's tokens."""
    tokenizer = Tokenizer.from_file(str(tiny_path() / "tokenizer.json"))

    def stream(texts: Sequence[str]) -> Tensor:
        return data.encode(texts, tokenizer, end=END_OF_TEXT_ID)

    return Text(
        train_N=tuple(stream(data.prefix(split.train, TRAIN_BYTES)) for split in splits),
        heldout_N=tuple(stream([document.text for document in split.heldout]) for split in splits),
    )


def run(text: Text, trial: Trial, name: str, *, told: Callable[[loop.Step], None]) -> dict[str, Any]:
    """Train a new model under the balance `name`, and tell each step; what became of it, as plain values.

    That is one side by its name, or two where experts choose: as trained, and as it can be served.
    """
    balance = BALANCES[name]
    ways = {name: True, name + AS_SERVED: False} if balance.experts_choose else {name: False}
    model = new_model(fitted(trial.config, balance), seed=trial.seed)
    batches_BT = data.mixed_batches(text.train_N, windows=trial.windows, length=trial.window, seed=trial.seed)
    # Mixed as in training, since where experts choose, those of a token depend on the rest of its batch.
    heldout_BT = data.mixed_batches(text.heldout_N, windows=trial.windows, length=trial.window, seed=0)
    whole_BT = tuple(islice(heldout_BT, trial.heldout_batches))
    probe_BT = whole_BT[: trial.probe_batches]
    budget = TokenBudget(trial.steps * trial.batch_tokens(text))
    curves: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}

    def look(gates: SteeredGates, tokens: int) -> None:
        for way, as_trained in ways.items():
            seen = evaluate_batches(model, gates, probe_BT, as_trained=as_trained)
            curves[way].append({"tokens": tokens, **figures(seen)})

    with steer(model, balance) as gates:
        look(gates, 0)
        for step in loop.train(model, batches_BT, trial.schedule(text), gates, budget):
            told(step)
            if step.number % trial.steps_between_points == 0 or step.number == trial.steps:
                look(gates, step.tokens)
        return {
            way: {
                "heldout": figures(evaluate_batches(model, gates, whole_BT, as_trained=as_trained)),
                "curve": {key: [point[key] for point in curves[way]] for key in curves[way][0]},
            }
            for way, as_trained in ways.items()
        }


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """Its loss in nats for each token and, per layer, the balancedness and the number of dead experts."""
    return {
        "loss": round(evaluation.loss, 4),
        "balancedness": [round(balancedness(tokens_E), 4) for tokens_E in evaluation.load_LE],
        "dead": [int(is_dead(tokens_E, share=DEAD_SHARE).sum()) for tokens_E in evaluation.load_LE],
    }
