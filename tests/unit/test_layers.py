"""Layers on their own, in one process: gradients, gates that leave choices out, folders, and what is refused."""

from __future__ import annotations

import pytest
import torch

from expertmesh.checkpoint.layer_folder import index_layers, is_layer_folder, layer_config, new_folder, read_config
from expertmesh.checkpoint.trained import read_trained, write_trained
from expertmesh.errors import CheckpointError, ConfigError
from expertmesh.gates.spec import GateSpec
from expertmesh.ids import ExpertId
from expertmesh.kernels.activation import ACTIVATIONS, POINTWISE, activate
from expertmesh.kernels.differentiable import expert_ffn
from expertmesh.kernels.spec import Activation, ExpertSpec, ExpertWeights
from expertmesh.layers.local import LocalExperts
from expertmesh.layers.module import MoELayer
from expertmesh.optimizer import Optimizer

H, E = 6, 4
CONFIG = layer_config(hidden=H, intermediate=5, num_experts=E, num_layers=2, bias=True)
TOP2 = GateSpec(strategy="softmax-topk", num_experts=E, k=2, normalize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers") / "new"
    new_folder(folder, CONFIG, seed=3)
    return folder


KINDS = [(name, True) for name in sorted(ACTIVATIONS)] + [(name, False) for name in sorted(POINTWISE)]


@pytest.mark.parametrize(("name", "gated"), KINDS)
def test_what_is_differentiated_is_what_kernels_compute(name, gated) -> None:
    activation = Activation(name=name, limit=2.0, alpha=1.7)
    spec = ExpertSpec(hidden=H, intermediate=H, gated=gated, activation=activation)
    expert = ExpertWeights(torch.eye(H).repeat(2 if gated else 1, 1), torch.eye(H))
    x_RH = torch.linspace(-6, 6, 5 * H).view(5, H)
    expected = activate(x_RH @ expert.w_in.T, activation, gated=gated)
    torch.testing.assert_close(expert_ffn(spec, expert, x_RH), expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_layer_are_those_of_finite_differences(folder) -> None:
    layer = MoELayer(LocalExperts(folder), GateSpec(strategy="dense", num_experts=E), layer=1).double()
    layer.experts.dtype = torch.float64
    names, tensors = zip(*layer.named_parameters(), strict=True)
    used = [name for name in names if "expert_0" not in name]
    x_TH = torch.randn(3, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(used, values, strict=True)), (x,))

    values = [tensor.detach().requires_grad_() for name, tensor in zip(names, tensors, strict=True) if name in used]
    assert torch.autograd.gradcheck(call, (x_TH, *values))


@pytest.mark.parametrize(
    "gate",
    [
        GateSpec(strategy="top-p", num_experts=E, top_p=0.5),
        GateSpec(strategy="switch", num_experts=E, capacity_factor=0.5),
        GateSpec(strategy="expert-choice", num_experts=E, capacity_factor=1.0),
        GateSpec(strategy="dense", num_experts=E),
        TOP2,
    ],
)
def test_a_layer_is_the_weighted_sum_of_its_experts(folder, gate) -> None:
    experts = LocalExperts(folder)
    layer = MoELayer(experts, gate)
    x = torch.randn(3, 4, H, generator=torch.Generator().manual_seed(2))
    y = layer(x)
    assert layer.choices is not None
    gates_TE = layer.choices.spread(E)
    rows = [expert_ffn(CONFIG.spec, experts.weights(ExpertId(0, e)), x.view(-1, H)) for e in range(E)]
    expected = sum(gates_TE[:, e, None] * rows[e] for e in range(E))
    torch.testing.assert_close(y, expected.view(3, 4, H), rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    assert layer.gate.weight.grad.abs().sum() > 0


def test_one_clear_error_each_for_what_does_not_fit(folder) -> None:
    experts = LocalExperts(folder)
    with pytest.raises(ConfigError, match="x has rows of 7 numbers, and the experts take 6"):
        MoELayer(experts, TOP2)(torch.zeros(2, 7))
    with pytest.raises(ConfigError, match="did you mean softmax-topk"):
        GateSpec(strategy="softmax-top", num_experts=E, k=2)
    with pytest.raises(ConfigError, match=r"gate.num_experts is 8, but layer 0 has 4: use 4"):
        MoELayer(experts, GateSpec(strategy="dense", num_experts=8))
    with pytest.raises(ConfigError, match="no layer 2; the experts are of layers 0 to 1"):
        MoELayer(experts, TOP2, layer=2)
    with pytest.raises(ConfigError, match="hash needs token ids"):
        MoELayer(experts, GateSpec(strategy="hash", num_experts=E, k=1))
    with pytest.raises(ConfigError, match=r"optimizer.name 'adam' is unknown: did you mean adamw"):
        Optimizer(name="adam")
    with pytest.raises(ConfigError, match=r"optimizer.beta2 is nan"):
        Optimizer(beta2=float("nan"))
    with pytest.raises(ConfigError, match="layer: hidden: "):
        layer_config(hidden=0, intermediate=1, num_experts=1)
    with pytest.raises(ConfigError, match="did you mean 'intermediate'"):
        layer_config(hidden=1, intermidiate=1, num_experts=1)
    with pytest.raises(ConfigError, match="activation 'swish' is unknown: did you mean"):
        layer_config(hidden=1, intermediate=1, num_experts=1, activation="swish")
    with pytest.raises(ConfigError, match="holds a checkpoint already"):
        new_folder(folder, CONFIG)


def test_a_folder_says_what_it_is_and_what_is_wrong_with_it(folder, tmp_path) -> None:
    assert is_layer_folder(folder)
    assert not is_layer_folder(tmp_path)
    assert read_config(folder) == CONFIG
    assert len(index_layers(folder).recipes) == 2 * E
    with pytest.raises(CheckpointError, match=r"cannot read config.json"):
        read_config(tmp_path)
    config = (folder / "config.json").read_text()
    new_folder(tmp_path / "a", CONFIG)
    (tmp_path / "a/config.json").write_text(config.replace('"hidden": 6', '"hidden": 7'))
    with pytest.raises(CheckpointError, match=r"w_in of .* has shape \[10, 6\], and the config wants \[10, 7\]"):
        index_layers(tmp_path / "a")
    (tmp_path / "a/config.json").write_text(config.replace('"num_experts": 4', '"num_experts": 5'))
    with pytest.raises(CheckpointError, match=r"has no tensor layers.0.experts.4.w_in"):
        index_layers(tmp_path / "a")


def test_what_was_trained_goes_on_only_from_its_own_step_with_its_own_optimizer(folder, tmp_path) -> None:
    expert, adamw = ExpertId(1, 2), Optimizer()
    recipe = index_layers(folder).recipes[expert]
    weights = {name: torch.randn(shape) for name, shape in CONFIG.spec.shapes.items()}
    state = {
        f"{key}.{name}": torch.ones(() if key == "step" else t.shape)
        for name, t in weights.items()
        for key in adamw.state
    }
    write_trained(tmp_path, expert, 5, weights | state)
    read = read_trained(tmp_path, recipe, CONFIG.spec, 5, adamw)
    assert torch.equal(read.weights.w_out, weights["w_out"])
    assert set(read.state["b_in"]) == set(adamw.state)
    with pytest.raises(CheckpointError, match="is of step 5, not 6"):
        read_trained(tmp_path, recipe, CONFIG.spec, 6, adamw)
    with pytest.raises(CheckpointError, match="another optimizer than sgd"):
        read_trained(tmp_path, recipe, CONFIG.spec, 5, Optimizer(name="sgd", momentum=0.9))
    assert read_trained(tmp_path, recipe, CONFIG.spec, 0, Optimizer(name="sgd")).state == {}
    write_trained(tmp_path, expert, 5, weights | state | {"exp_avg.w_in": torch.full((3,), 1.0)})
    with pytest.raises(CheckpointError, match="has not the shape"):
        read_trained(tmp_path, recipe, CONFIG.spec, 5, adamw)
    assert [path.name for path in tmp_path.iterdir()] == ["expert-1-2.safetensors"]
