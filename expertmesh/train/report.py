"""What the trained model is: its held-out loss, how each domain uses the experts, and what it writes.

Owns the figures. Does not know how the model was trained or where the figures are written. Invariant: every figure is
of the model that is given, so the same checkpoint gives the same figures again.

Shapes: D domains, L MoE layers, E experts, N tokens of a stream, B windows, T tokens of a window.
"""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
import transformers

from expertmesh.models import PROMPTS
from expertmesh.train.balance import BALANCES, steer
from expertmesh.train.data import encode
from expertmesh.train.loop import next_token_loss
from expertmesh.train.model import END_OF_TEXT_ID, WINDOW

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

    from expertmesh.train.balance import SteeredGates
    from expertmesh.train.data import Split
    from expertmesh.train.sources import Corpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A model on one stream: mean loss in nats for each token, and tokens that each expert of each layer got."""

    loss: float
    tokens: int
    load_LE: Tensor


def evaluate(model: Qwen3MoeForCausalLM, ids_N: Tensor, *, window: int) -> Evaluation:
    """Run the plain model over a stream in windows that do not overlap; a rest shorter than a window is left out.

    Raises ValueError when the stream is shorter than one window.
    """
    ids_BT = ids_N[: len(ids_N) // window * window].view(-1, window)
    if len(ids_BT) == 0:
        raise ValueError(f"{len(ids_N)} tokens are less than one window of {window}")
    with steer(model, BALANCES["none"]) as gates:
        return evaluate_batches(model, gates, torch.split(ids_BT, 8))


@torch.no_grad()
def evaluate_batches(
    model: Qwen3MoeForCausalLM, gates: SteeredGates, batches_BT: Sequence[Tensor], *, as_trained: bool = False
) -> Evaluation:
    """Run the model over batches of equal windows with its gates as they are steered.

    They choose as they can be served, or `as_trained`; see `SteeredGates`.
    """
    model.train(as_trained)
    losses, loads = [], []
    for batch_BT in batches_BT:
        outputs = model(input_ids=batch_BT, use_cache=False)
        losses.append(next_token_loss(outputs.logits, batch_BT) * len(batch_BT))
        loads.append(gates.tokens_LE())
    return Evaluation(
        loss=float(torch.stack(losses).sum() / sum(len(batch_BT) for batch_BT in batches_BT)),
        tokens=sum(batch_BT.numel() for batch_BT in batches_BT),
        load_LE=torch.stack(loads).sum(dim=0),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertUse:
    """How the domains share the experts.

    share_DLE: of a domain's tokens in a layer, the share that each expert gets; sums to 1 over E.
    """

    domains: tuple[str, ...]
    share_DLE: Tensor

    @classmethod
    def of(cls, evaluations: Mapping[str, Evaluation]) -> ExpertUse:
        """Take the shares from what `evaluate` counted for each domain."""
        load_DLE = torch.stack([evaluation.load_LE for evaluation in evaluations.values()]).double()
        return cls(domains=tuple(evaluations), share_DLE=load_DLE / load_DLE.sum(dim=-1, keepdim=True))

    def least_share_L(self) -> Tensor:
        """Return each layer's least used expert's share of the evenly mixed domains, as a multiple of an even share."""
        mixed_LE = self.share_DLE.mean(dim=0)
        return mixed_LE.amin(dim=-1) * mixed_LE.shape[-1]

    def distance_L(self, one: str, other: str) -> Tensor:
        """Return each layer's total-variation distance of two domains' shares: 0 is the same, 1 is nothing shared."""
        one_LE, other_LE = (self.share_DLE[self.domains.index(domain)] for domain in (one, other))
        return 0.5 * (one_LE - other_LE).abs().sum(dim=-1)

    def own_share_DL(self) -> Tensor:
        """Return the share of a domain's tokens that goes to the experts which serve that domain more than any other.

        Without specialisation it would be near 1 / D on average over the domains.
        """
        owner_LE = self.share_DLE.argmax(dim=0)
        is_own_DLE = owner_LE == torch.arange(len(self.domains))[:, None, None]
        return (self.share_DLE * is_own_DLE).sum(dim=-1)

    def figures(self) -> dict[str, Any]:
        """Return all of it as plain rounded numbers, for a file."""
        return {
            "least_share_of_even": rounded(self.least_share_L()),
            "distance": {
                f"{one}-{other}": rounded(self.distance_L(one, other)) for one, other in combinations(self.domains, 2)
            },
            "own_experts_share": dict(zip(self.domains, rounded(self.own_share_DL()), strict=True)),
            "share": dict(zip(self.domains, rounded(self.share_DLE), strict=True)),
        }


def rounded(values: Tensor) -> Any:
    """Return a tensor as nested lists of numbers with four decimals."""
    return torch.round(values.double(), decimals=4).tolist()


def sample(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, *, seed: int) -> str:
    """Return the prompt with a continuation, drawn as the model's generation config says."""
    model.eval()
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=120)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def account(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpora: Sequence[Corpus],
    splits: Sequence[Split],
    samples: Mapping[str, str],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure the model and return everything worth knowing about it, as plain values for a file.

    `samples` are the held-out samples that ship; `options` are the settings of the run.
    """
    domains: dict[str, dict[str, Any]] = {}
    evaluations: dict[str, Evaluation] = {}
    for corpus, split in zip(corpora, splits, strict=True):
        texts = [document.text for document in split.heldout]
        ids_N = encode(texts, tokenizer.backend_tokenizer, end=END_OF_TEXT_ID)
        whole = evaluations[corpus.domain] = evaluate(model, ids_N, window=WINDOW)
        shipped_N = encode([samples[corpus.domain]], tokenizer.backend_tokenizer, end=END_OF_TEXT_ID)
        bytes_per_token = sum(len(text.encode()) for text in texts) / len(ids_N)
        domains[corpus.domain] = {
            "source": corpus.source,
            "licence": corpus.licence,
            "sha256": corpus.sha256,
            "documents": len(corpus.documents),
            "heldout_documents": len(split.heldout),
            "heldout_tokens": whole.tokens,
            "heldout_loss": round(whole.loss, 4),
            "heldout_bits_per_byte": round(whole.loss / math.log(2) / bytes_per_token, 4),
            "sample_loss": round(evaluate(model, shipped_N, window=WINDOW).loss, 4),
        }
    return {
        "command": "python -m expertmesh.train "
        + " ".join(f"--{name} {options[name]}" for name in ("tokens", "seed", "balance")),
        "options": dict(options),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "parameters": model.num_parameters(),
        "layers": model.config.num_hidden_layers,
        "experts": model.config.num_experts,
        "experts_per_token": model.config.num_experts_per_tok,
        "window": WINDOW,
        "domains": domains,
        "expert_use": ExpertUse.of(evaluations).figures(),
        "samples": {domain: sample(model, tokenizer, prompt, seed=0) for domain, prompt in PROMPTS.items()},
    }
