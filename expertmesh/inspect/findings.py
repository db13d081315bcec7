"""From what the gates chose to figures, layer by layer: who fires for what, how evenly, how surely.

Pure: readings in, values out. Domains count alike, however long each is, wherever a figure is of all of them. Dead and
overloaded are said of the texts that were read; a model may well use an expert for others.

Shapes: T tokens, K choices of a token, E experts of the layer, D domains.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch

from expertmesh.gates.choices import Choices, count_tokens
from expertmesh.gates.measures import balancedness, gate_entropy, is_dead, load_entropy, overlap
from expertmesh.inspect.twins import Pair, closest_pairs
from expertmesh.inspect.typical import TypicalToken, count_by_token, typical_tokens
from expertmesh.train.report import ExpertUse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from expertmesh.inspect.watch import Reading
    from expertmesh.serve.text import TextCodec

NEARLY_DEAD = 0.1
"""An expert that gets at most this part of an even share."""

OVERLOADED = 2.0
"""One that gets so many even shares, or more."""

BINS = 20
"""Of a histogram of confidence."""

ENOUGH_TOKENS = 30
"""What each expert would get if load were even, below which no expert can be called dead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """How much of a token's answer is its first choice's, by weight: from 1/K, a gate that cannot decide, to 1.

    With one choice for each token, its weight as the model has it.
    """

    mean: float
    entropy: float
    """That of a token's weights over its choices, over its maximum: 0 sure, 1 undecided."""
    low: float
    """Where the first of BINS equal bins begins; the last ends at 1."""
    shares: tuple[float, ...]
    """Of the tokens, in each bin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainUse:
    """How one domain uses one layer's experts."""

    domain: str
    tokens: tuple[int, ...]
    """That each expert gets."""
    shares: tuple[float, ...]
    """The same, of all choices."""
    balancedness: float
    own_share: float
    """What goes to the experts that serve this domain more than any other; without specialisation about 1/D."""
    overlap: float | None
    """Of a token's choices, the share that the token before made as well. By chance K/E."""
    confidence: Confidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How differently two domains use a layer: 0 if alike, 1 if they share no expert (total variation)."""

    domains: tuple[str, str]
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFindings:
    """One MoE layer."""

    layer: int
    num_experts: int
    k: int
    shares: tuple[float, ...]
    """Each expert's of all choices, domains counted alike."""
    balancedness: float
    load_entropy: float
    dead: tuple[int, ...]
    """Experts without a single token."""
    nearly_dead: tuple[int, ...]
    overloaded: tuple[int, ...]
    closest: tuple[Pair, ...]
    domains: tuple[DomainUse, ...]
    distances: tuple[Distance, ...]
    """Of each two domains."""
    typical: tuple[tuple[TypicalToken, ...], ...]
    """For each expert."""

    @property
    def loads(self) -> tuple[float, ...]:
        """Each expert's load over an even share."""
        return tuple(share * self.num_experts for share in self.shares)

    @property
    def twins(self) -> tuple[Pair, ...]:
        return tuple(pair for pair in self.closest if pair.is_twin)

    @property
    def confidence(self) -> float:
        """Mean over the domains."""
        return sum(use.confidence.mean for use in self.domains) / len(self.domains)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """A model's."""

    model: str
    tokens: dict[str, int]
    """Read, by domain."""
    layers: tuple[LayerFindings, ...]

    @property
    def is_enough(self) -> bool:
        """Whether enough was read to call an expert dead."""
        read = sum(self.tokens.values())
        return all(read * layer.k / layer.num_experts >= ENOUGH_TOKENS for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        data = dataclasses.asdict(self)
        for found, layer in zip(data["layers"], self.layers, strict=True):
            found["twins"] = [list(pair.experts) for pair in layer.twins]
        data["is_enough"] = self.is_enough
        plain: dict[str, Any] = _rounded(data)
        return plain


def find(
    num_experts: Sequence[int], readings: Sequence[Reading], layers: Sequence[int], codec: TextCodec
) -> Iterator[LayerFindings]:
    """The findings of each of `layers`, one after another: a large model has many."""
    for layer in layers:
        yield _find_in_layer(layer, num_experts[layer], readings, codec)


def _find_in_layer(layer: int, num_experts: int, readings: Sequence[Reading], codec: TextCodec) -> LayerFindings:
    tokens_DE = torch.stack([count_tokens(reading.layers[layer].index_TK, num_experts) for reading in readings])
    share_DE = tokens_DE.double() / tokens_DE.sum(dim=1, keepdim=True).clamp(min=1)
    share_E = share_DE.mean(dim=0)
    use = ExpertUse(domains=tuple(reading.domain for reading in readings), share_DLE=share_DE.unsqueeze(1))
    own_D = use.own_share_DL()[:, 0]
    is_dead_E, is_nearly_E = is_dead(share_E), is_dead(share_E, share=NEARLY_DEAD)
    choices = Choices(
        index_TK=torch.cat([reading.layers[layer].index_TK for reading in readings]),
        weights_TK=torch.cat([reading.layers[layer].weights_TK for reading in readings]),
    )
    counts = count_by_token(torch.cat([reading.ids_T for reading in readings]), choices.index_TK, num_experts)
    return LayerFindings(
        layer=layer,
        num_experts=num_experts,
        k=choices.index_TK.shape[1],
        shares=tuple(share_E.tolist()),
        balancedness=balancedness(share_E),
        load_entropy=load_entropy(share_E),
        dead=_numbers(is_dead_E),
        nearly_dead=_numbers(is_nearly_E & ~is_dead_E),
        overloaded=_numbers(share_E * num_experts >= OVERLOADED),
        closest=closest_pairs(choices, counts),
        domains=tuple(
            DomainUse(
                domain=reading.domain,
                tokens=tuple(tokens_E.tolist()),
                shares=tuple(domain_share_E.tolist()),
                balancedness=balancedness(tokens_E),
                own_share=float(own),
                overlap=_or_none(overlap(reading.layers[layer].index_TK)),
                confidence=measure_confidence(reading.layers[layer]),
            )
            for reading, tokens_E, domain_share_E, own in zip(readings, tokens_DE, share_DE, own_D, strict=True)
        ),
        distances=tuple(
            Distance(domains=pair, value=float(use.distance_L(*pair)[0])) for pair in combinations(use.domains, 2)
        ),
        typical=tuple(typical_tokens(counts, readings, layer, codec)),
    )


def measure_confidence(choices: Choices) -> Confidence:
    """Of the tokens that get an expert at all."""
    weights_TK = choices.weights_TK[choices.is_expert_TK.any(dim=1)].double()
    k = weights_TK.shape[1]
    part_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True) if k > 1 else weights_TK.clamp(max=1.0)
    first_T = part_TK.amax(dim=1)
    low = 1 / k if k > 1 else 0.0
    bin_T = ((first_T - low) / (1 - low) * BINS).long().clamp(0, BINS - 1)
    num_tokens = max(1, len(first_T))
    return Confidence(
        mean=float(first_T.sum()) / num_tokens,
        entropy=gate_entropy(part_TK) if k > 1 and len(first_T) else 0.0,
        low=low,
        shares=tuple((torch.bincount(bin_T, minlength=BINS) / num_tokens).tolist()),
    )


def _numbers(is_so_E: torch.Tensor) -> tuple[int, ...]:
    return tuple(is_so_E.nonzero().flatten().tolist())


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _rounded(value: Any) -> Any:
    """The same with every number to six decimals, far below what a sample can tell."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
