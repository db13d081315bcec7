"""A layer trained by host processes, beside the same layer in one process: gradients, losses, and a host's death."""

from __future__ import annotations

import pytest
import torch

from expertmesh.checkpoint.layer_folder import layer_config, new_folder
from expertmesh.errors import ConfigError, TrainingLostError
from expertmesh.gates.spec import GateSpec
from expertmesh.ids import ExpertId
from expertmesh.layers.example import LAYER, Fleet, train
from expertmesh.layers.local import LocalExperts
from expertmesh.layers.module import MoELayer
from expertmesh.layers.trained import TrainedExperts
from expertmesh.optimizer import Optimizer

H, E = 6, 4


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def fleet(root):
    with Fleet(root, "token") as fleet:
        yield fleet


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(fleet, folder, optimizer=None, **options) -> TrainedExperts:
    return TrainedExperts(folder, fleet.addresses, optimizer, token="token", timeout_s=150, **options)


@pytest.mark.parametrize("strategy", [{"strategy": "softmax-topk", "k": 2}, {"strategy": "top-p", "top_p": 0.5}])
def test_gradients_are_those_of_the_same_layer_in_one_process(root, fleet, strategy) -> None:
    name = strategy["strategy"]
    new_folder(root / name, layer_config(hidden=H, intermediate=5, num_experts=E, bias=True), seed=1)
    gate = GateSpec(num_experts=E, **strategy)
    local = MoELayer(LocalExperts(root / name), gate)
    x = torch.randn(2, 9, H, generator=torch.Generator().manual_seed(1))
    by_local, by_remote = x.clone().requires_grad_(), x.clone().requires_grad_()
    with trained(fleet, root / name, Optimizer(name="sgd")) as experts:
        remote = MoELayer(experts, gate)
        remote.gate.load_state_dict(local.gate.state_dict())
        for layer, given in ((local, by_local), (remote, by_remote)):
            for part in given.split(1):  # two parts of one step
                layer(part).square().sum().backward()
        experts.step(1.0)
        experts.save(root / f"{name}-stepped")
    torch.testing.assert_close(by_remote.grad, by_local.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(remote.gate.weight.grad, local.gate.weight.grad, rtol=1e-4, atol=1e-5)
    stepped = dict(LocalExperts(root / f"{name}-stepped").named_parameters())
    for parameter, tensor in local.experts.named_parameters():
        moved = tensor if tensor.grad is None else tensor - tensor.grad
        torch.testing.assert_close(stepped[parameter], moved, rtol=1e-4, atol=1e-5)


def test_it_learns_as_in_one_process_and_a_death_on_the_way_changes_nothing(root, fleet) -> None:
    steps = 14
    for seed in range(3):
        folder = root / str(seed)
        new_folder(folder / "new", LAYER, seed)
        local = train(LocalExperts(folder / "new"), seed, steps)
        with trained(fleet, folder / "new") as experts:
            undisturbed = train(experts, seed, steps)
        assert undisturbed == pytest.approx(local, rel=1e-3)
        assert undisturbed[-1] < undisturbed[0]
    killed = []

    def before(step: int) -> None:
        if step == 8 and not killed:
            fleet.kill(0)
            killed.append(step)

    with trained(fleet, folder / "new") as experts:
        options = {"folder": folder, "save_every": 5, "before": before, "replace": fleet.replace}
        again = train(experts, seed, steps, **options)
        assert killed
        assert again == undisturbed  # bit for bit
        fleet.kill(1)
        with pytest.raises(TrainingLostError, match=r"is lost: .*; restore the last checkpoint"):
            experts.step(0.1)
        with pytest.raises(TrainingLostError, match="restore the last checkpoint"):
            experts.rows(0, torch.zeros(1, LAYER.hidden), torch.zeros(1, 1, dtype=torch.int64))
    fleet.replace()


def test_one_clear_error_each_for_what_cannot_be_trained(root, fleet) -> None:
    folder = root / "refused"
    new_folder(folder, layer_config(hidden=H, intermediate=5, num_experts=2), seed=1)
    first, second = fleet.addresses
    twice = {ExpertId(0, 0): [first], ExpertId(0, 1): [first, second]}
    cases = {
        "expert 0:1 has 2 replicas, and to be trained it must have one": twice,
        "expert 0:1 has 0 replicas": {ExpertId(0, 0): [first]},
        "at here:1, which is not among hosts": {ExpertId(0, 0): ["here:1"], ExpertId(0, 1): [first]},
    }  # fmt: skip
    for text, placement in cases.items():
        with pytest.raises(ConfigError, match=text):
            trained(fleet, folder, placement=placement)
    with pytest.raises(ConfigError, match="hosts: 'somewhere' is no address; write it as host:port"):
        TrainedExperts(folder, ["somewhere"], token="token")
    with pytest.raises(ConfigError, match="hosts: give the address of each host, once"):
        TrainedExperts(folder, [first, first], token="token")
    with trained(fleet, folder) as experts:
        with pytest.raises(ConfigError, match="holds a checkpoint already"):
            experts.save(folder)
        layer = MoELayer(experts, GateSpec(strategy="dense", num_experts=2))
        loss = layer(torch.ones(1, H)).sum()
        experts.step(0.1)
        with pytest.raises(ConfigError, match="these rows are of step 0, and a step was taken since"):
            loss.backward()
