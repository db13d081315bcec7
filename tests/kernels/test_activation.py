"""Activations against transformers' own; and each element's result against the same element elsewhere in a tensor."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from expertmesh.errors import CheckpointError
from expertmesh.kernels.activation import ACTIVATIONS, POINTWISE, activate, match_activation
from expertmesh.kernels.spec import Activation
from tests.kernels.cases import GATED_ACTIVATIONS

OWN_CONSTANTS = {
    "DeepseekV4Experts": Activation(name="swiglu_clamped", limit=10.0),
    "Glm5NextTextExperts": Activation(name="swiglu_clamped", limit=10.0),
    "HYV4Experts": Activation(name="swiglu_clamped", limit=10.0),
    "GptOssExperts": Activation(name="swiglu_oai", limit=7.0, alpha=1.702),
    "OpenAIPrivacyFilterExperts": Activation(name="swiglu_oai", limit=7.0, alpha=1.702),
    "MiniMaxM3VLExperts": Activation(name="swiglu_oai", limit=7.0, alpha=1.702),
    "Inkling2Experts": Activation(name="swiglu_softcapped", limit=25.0, alpha=4.0),
}


def experts_classes() -> list[type]:
    """Every class of transformers that its experts interface decorates."""
    classes = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if "@use_experts_implementation" in path.read_text():
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            classes += [
                value
                for value in vars(module).values()
                if inspect.isclass(value)
                and value.__module__ == module.__name__
                and hasattr(value, "_apply_gate")
                and hasattr(value.forward, "__wrapped__")
            ]
    return classes


def instantiate(experts_class: type) -> Any:
    """The experts with their family's default config, without memory for the weights."""
    configs = [
        value
        for value in vars(inspect.getmodule(experts_class)).values()
        if inspect.isclass(value) and issubclass(value, PreTrainedConfig) and value is not PreTrainedConfig
    ]
    sizes = {} if len(inspect.signature(experts_class.__init__).parameters) == 2 else {"intermediate_size": 8}
    for config_class in configs:
        try:
            config = config_class()
            for name in ("num_experts", "n_routed_experts", "moe_intermediate_size"):
                if getattr(config, name, 0) is None:
                    setattr(config, name, 8)
            with torch.device("meta"):
                return experts_class(config, **sizes)
        except (AttributeError, TypeError):  # the config of another part of the model
            continue
    raise AssertionError(f"no config among {configs} fits {experts_class}")


def in_slot_layout(experts: Any, h_RN: torch.Tensor) -> torch.Tensor:
    """The experts' own activation of rows that have the gate's columns first."""
    if not experts.has_gate:
        return experts.act_fn(h_RN)
    if not experts.is_concatenated:
        h_RN = torch.stack(h_RN.chunk(2, dim=-1), dim=-1).flatten(1)
    return experts._apply_gate(h_RN)


@pytest.mark.parametrize("experts_class", experts_classes(), ids=lambda experts_class: experts_class.__name__)
def test_the_activation_of_every_experts_class_of_transformers_is_found_and_reproduced(experts_class):
    experts = instantiate(experts_class)
    found = match_activation(lambda h_RN: in_slot_layout(experts, h_RN), gated=experts.has_gate)
    h_RN = torch.randn(64, 2 * 37, generator=torch.Generator().manual_seed(3)) * 8
    torch.testing.assert_close(
        activate(h_RN, found, gated=experts.has_gate), in_slot_layout(experts, h_RN), rtol=1e-5, atol=1e-5
    )
    if experts_class.__name__ in OWN_CONSTANTS:
        assert found == OWN_CONSTANTS[experts_class.__name__]
    else:
        assert found.name in POINTWISE


@pytest.mark.parametrize("name", POINTWISE)
def test_a_plain_activation_is_the_one_that_transformers_calls_so(name):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])])
    torch.testing.assert_close(activate(x[None], Activation(name=name), gated=False)[0], ACT2FN[name](x))


def test_step_bounds_silu_after_it_is_taken():
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    experts = Step3p7Experts.__new__(Step3p7Experts)
    torch.nn.Module.__init__(experts)
    experts.act_fn, experts.limit = F.silu, 7.0
    guess = Activation(name="swiglu_bounded", limit=7.0)
    assert match_activation(experts._apply_gate, gated=True, candidates=[guess]) == guess


def test_a_guess_with_unusual_constants_is_confirmed_by_the_model():
    def apply_gate(h):
        gate, up = h.chunk(2, dim=-1)
        gate, up = gate.clamp(max=3.25), up.clamp(-3.25, 3.25)
        return (up + 1) * gate * torch.sigmoid(gate * 1.3)

    guesses = [Activation(name="swiglu_oai", limit=limit, alpha=alpha) for limit in (7.0, 3.25) for alpha in (1.0, 1.3)]
    assert match_activation(apply_gate, gated=True, candidates=guesses) == guesses[3]


def half(h):
    return h.chunk(2, dim=-1)


@pytest.mark.parametrize(
    ("gated", "apply_gate"),
    [
        (False, F.mish),
        (False, lambda h: F.leaky_relu(h, 0.001)),
        (False, lambda h: F.silu(h) * 1.0001),
        (True, lambda h: F.hardswish(half(h)[0]) * half(h)[1]),
        (True, lambda h: F.silu(half(h)[1]) * half(h)[0]),
        (True, lambda h: F.silu(half(h)[0].clamp(max=9.0)) * half(h)[1].clamp(-9.0, 9.0)),
        (True, lambda h: F.silu(half(h)[0]).clamp(max=1e5) * half(h)[1]),
        (True, lambda h: F.silu(F.normalize(half(h)[0])) * half(h)[1]),
        (True, lambda h: F.silu(half(h)[0]) * half(h)[1] * float("nan")),
    ],
    ids=["mish", "leaky", "scaled", "hardswish", "swapped", "unguessed limit", "far limit", "normalised", "nan"],
)
def test_a_function_that_is_none_of_ours_is_refused(gated, apply_gate):
    with pytest.raises(CheckpointError, match="activation"):
        match_activation(apply_gate, gated=gated, candidates=[Activation(name="mish"), Activation(name="silu")])


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS, ids=lambda activation: activation.name)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_an_elements_result_does_not_depend_on_its_place(activation, num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        # Wide enough that torch splits the whole between threads, at a place that falls inside a row.
        h_RN = torch.randn(999, 2 * 37, generator=torch.Generator().manual_seed(4)) * 5
        for gated in (True, False) if activation.name in POINTWISE else (True,):
            whole = activate(h_RN, activation, gated=gated)
            for count in (*range(1, 18), 31, 64, 500):
                for start in (0, 5, len(h_RN) - count):
                    rows = slice(start, start + count)
                    assert torch.equal(activate(h_RN[rows].clone(), activation, gated=gated), whole[rows])
    finally:
        torch.set_num_threads(before)


def test_every_name_is_plain_or_gated():
    assert {activation.name for activation in GATED_ACTIVATIONS} == ACTIVATIONS
