"""From a `GateSpec` to choices: the one place where a strategy's name meets its gate.

Knows nothing of models: logits and whatever else a gate looks at are handed in. Invariant: what comes back fits the
exchange, one row for each token, by the convention of `choices`.

Shapes: T tokens, E experts of the layer, K choices of a token, V token ids of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from expertmesh.errors import ConfigError
from expertmesh.gates.capacity import expert_choice, gshard, switch
from expertmesh.gates.choices import Choices
from expertmesh.gates.hashing import hash_gate
from expertmesh.gates.select import (
    dense,
    noisy_topk,
    sigmoid_topk,
    softmax_topk,
    sqrt_softplus_topk,
    threshold,
    top_p,
    topk_softmax,
)
from expertmesh.gates.spec import GateSpec
from expertmesh.gates.strategies import STRATEGIES


@dataclass(frozen=True, slots=True, kw_only=True)
class GateInput:
    """What a gate looks at. All but the logits only where the strategy asks for it (`Strategy.inputs`)."""

    logits_TE: torch.Tensor
    noise_TE: torch.Tensor | None = None
    """The learned width of the noise, before softplus."""
    token_T: torch.Tensor | None = None
    """The tokens' ids, int64."""
    table_VK: torch.Tensor | None = None
    """The hash table, of `hashing`."""
    bias_E: torch.Tensor | None = None
    """The selection bias of a checkpoint or of `balancing.update_bias`, where the strategy takes groups."""


Gate: TypeAlias = Callable[[GateSpec, GateInput, torch.Generator | None], Choices]


def route(spec: GateSpec, given: GateInput, *, generator: torch.Generator | None = None) -> Choices:
    """Choose experts for the tokens of one layer, as `spec` says.

    With a generator, strategies that draw do so; without, noise is left out. Raises ConfigError when the spec does not
    fit what is given, or when an expert overflows and the spec says that this is an error.
    """
    spec = spec.for_layer(given.logits_TE.shape[1])
    for name in STRATEGIES[spec.strategy].inputs:
        if getattr(given, name) is None:
            raise ConfigError(
                f"gate.strategy {spec.strategy} needs {name}, which this layer does not have: use another strategy"
            )
    if given.bias_E is not None and "num_groups" not in STRATEGIES[spec.strategy].takes:
        raise ConfigError(
            f"gate.strategy {spec.strategy} takes no selection bias, which this layer has: use softmax-topk or"
            " sigmoid-topk"
        )
    return GATES[spec.strategy](spec, given, generator)


def _scored(gate: Callable[..., Choices]) -> Gate:
    """A gate of scores, with all that steers its selection."""

    def choose(spec: GateSpec, given: GateInput, generator: torch.Generator | None) -> Choices:
        steering = {"normalize": spec.normalize, "scale": spec.scale, "bias_E": given.bias_E, "groups": spec.groups}
        return gate(given.logits_TE, spec.k, **steering)

    return choose


def _switch(spec: GateSpec, given: GateInput, generator: torch.Generator | None) -> Choices:
    capacity = spec.capacity(len(given.logits_TE))
    return switch(given.logits_TE, capacity=capacity, overflow=spec.overflow, by_confidence=spec.by_confidence)


def _gshard(spec: GateSpec, given: GateInput, generator: torch.Generator | None) -> Choices:
    if spec.random_second and generator is None:
        raise ConfigError("gate.random_second draws, and no randomness is given here: set it to false")
    return gshard(
        given.logits_TE,
        capacity=spec.capacity(len(given.logits_TE)),
        overflow=spec.overflow,
        by_confidence=spec.by_confidence,
        normalize_kept=spec.normalize,
        generator=generator if spec.random_second else None,
    )


def _hash(spec: GateSpec, given: GateInput, generator: torch.Generator | None) -> Choices:
    assert given.token_T is not None
    assert given.table_VK is not None
    if given.table_VK.shape[1] != spec.k:
        raise ConfigError(f"gate.k is {spec.k}, but the hash table has {given.table_VK.shape[1]} experts for each id")
    return hash_gate(given.token_T, given.table_VK)


def _noisy(spec: GateSpec, given: GateInput, generator: torch.Generator | None) -> Choices:
    assert given.noise_TE is not None
    assert spec.k is not None
    return noisy_topk(given.logits_TE, given.noise_TE, spec.k, generator=generator)


def _topk_softmax(spec: GateSpec, given: GateInput, generator: torch.Generator | None) -> Choices:
    assert spec.k is not None
    return topk_softmax(given.logits_TE, spec.k)


def _top_p(spec: GateSpec, given: GateInput, generator: torch.Generator | None) -> Choices:
    assert spec.top_p is not None
    return top_p(given.logits_TE, spec.top_p, k=spec.k, normalize=spec.normalize, scale=spec.scale)


def _threshold(spec: GateSpec, given: GateInput, generator: torch.Generator | None) -> Choices:
    assert spec.ratio is not None
    assert spec.k is not None
    return threshold(given.logits_TE, spec.ratio, spec.k, normalize=spec.normalize, scale=spec.scale)


def _expert_choice(spec: GateSpec, given: GateInput, generator: torch.Generator | None) -> Choices:
    capacity = spec.capacity(len(given.logits_TE))
    assert capacity is not None
    return expert_choice(given.logits_TE, capacity)


def _dense(spec: GateSpec, given: GateInput, generator: torch.Generator | None) -> Choices:
    return dense(given.logits_TE)


GATES: dict[str, Gate] = {
    "softmax-topk": _scored(softmax_topk),
    "topk-softmax": _topk_softmax,
    "sigmoid-topk": _scored(sigmoid_topk),
    "sqrt-softplus-topk": _scored(sqrt_softplus_topk),
    "switch": _switch,
    "gshard": _gshard,
    "noisy-topk": _noisy,
    "hash": _hash,
    "top-p": _top_p,
    "threshold": _threshold,
    "expert-choice": _expert_choice,
    "dense": _dense,
}
"""By the names of `STRATEGIES`."""
