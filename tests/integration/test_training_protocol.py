"""The service Training by its messages alone, as a trainer in another language would use it: what counts once, and what
is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from expertmesh._proto import host_pb2 as pb
from expertmesh._proto.host_pb2_grpc import HostStub, TrainingStub
from expertmesh.checkpoint.layer_folder import index_layers, layer_config, new_folder
from expertmesh.hosts.configuration import configuration_for
from expertmesh.hosts.host import Host
from expertmesh.hosts.process import HostServer
from expertmesh.kernels.differentiable import expert_ffn
from expertmesh.kernels.spec import ExpertWeights
from expertmesh.transport import codec
from expertmesh.transport.grpc_link import credentials

H = 6
CONFIG = layer_config(hidden=H, intermediate=5, num_experts=3)
PLAIN = pb.Optimizer(name="sgd")
ROWS = np.linspace(-1, 1, 2 * H, dtype=np.float32).reshape(2, H)
GRADS = np.linspace(-2, 1, 3 * H, dtype=np.float32).reshape(3, H)
CALL = {"metadata": credentials("token"), "timeout": 60}


class Trainer:
    """A host with experts 0 and 1 of three."""

    def __init__(self, channel: grpc.Channel, root: Path) -> None:
        self.host, self.training, self.root = HostStub(channel), TrainingStub(channel), root
        self.fill()

    def fill(self) -> None:
        index = index_layers(self.root / "new")
        configuration = configuration_for(index, str(self.root / "new"))
        self.host.Configure(codec.encode_configuration(configuration), **CALL)
        for expert, recipe in list(index.recipes.items())[:2]:
            self.host.Load(codec.encode_recipe(expert.layer, expert.index, recipe), **CALL)

    def begin(self, session: int = 1, step: int = 0, optimizer: pb.Optimizer = PLAIN) -> pb.BeginReply:
        return self.training.Begin(pb.BeginRequest(session=session, step=step, optimizer=optimizer), **CALL)

    def backward(self, part: int, session: int = 1, step: int = 0, **changes: object) -> np.ndarray:
        fields = {
            "layer": 0, "dtype": pb.FLOAT32, "num_rows": 2, "rows": ROWS.tobytes(), "experts": [1, 0], "counts": [2, 1],
            "pair_rows": np.array([0, 1, 1], np.int32).tobytes(),
        }  # fmt: skip
        grads = changes.pop("grad_rows", GRADS.tobytes())
        pairs = pb.ExchangeRequest(**(fields | changes))
        message = pb.BackwardRequest(session=session, step=step, part=part, pairs=pairs, grad_rows=grads)
        return np.frombuffer(self.training.Backward(message, **CALL).grad_rows, np.float32).reshape(-1, H)

    def step(self, step: int, parts: int, rate: float = 1.0, session: int = 1) -> int:
        message = pb.StepRequest(session=session, step=step, parts=parts, learning_rate=rate)
        return self.training.Step(message, **CALL).step

    def saved(self, step: int, name: str, session: int = 1) -> dict[str, torch.Tensor]:
        folder = self.root / name
        folder.mkdir()
        reply = self.training.Save(pb.SaveRequest(session=session, step=step, folder=str(folder)), **CALL)
        assert reply.files == ["expert-0-0.safetensors", "expert-0-1.safetensors"]
        return load_file(folder / reply.files[0]) | load_file(folder / reply.files[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[grpc.Channel, Path]]:
    root = tmp_path_factory.mktemp("training")
    new_folder(root / "new", CONFIG, seed=1)
    server = HostServer(Host(2**20), "token", train=root)
    with grpc.insecure_channel(server.address) as channel:
        yield channel, root
    server.close()


@pytest.fixture
def trainer(served) -> Trainer:
    return Trainer(*served)


def refused(call, *arguments, **named) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **named)
    return caught.value.code(), caught.value.details()


def gradients(root: Path) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """The weights as new, with gradients of one part, and the gradients of its pairs' rows: by torch alone."""
    weights = {}
    rows = torch.from_numpy(ROWS[[0, 1, 1]]).requires_grad_()
    loss = torch.zeros(())
    for index, pairs in ((1, [0, 1]), (0, [2])):
        tensors = load_file(root / f"new/expert-0-{index}.safetensors")
        mine = {name: tensors[f"layers.0.experts.{index}.{name}"].requires_grad_() for name in ("w_in", "w_out")}
        weights |= {f"layers.0.experts.{index}.{name}": tensor for name, tensor in mine.items()}
        y = expert_ffn(CONFIG.spec, ExpertWeights(**mine), rows[pairs])
        loss = loss + (y * torch.from_numpy(GRADS[pairs])).sum()
    loss.backward()
    return weights, rows.grad.numpy()


def test_parts_add_up_once_each_and_a_step_is_taken_once(trainer: Trainer) -> None:
    weights, by_rows = gradients(trainer.root)
    assert trainer.begin().experts == 2
    first = trainer.backward(0)
    np.testing.assert_allclose(first, by_rows, rtol=1e-4, atol=1e-6)
    assert trainer.backward(0).tobytes() == first.tobytes()
    trainer.backward(1)
    assert trainer.step(0, parts=2) == 1
    assert trainer.step(0, parts=2) == 1
    assert trainer.begin().experts == 2  # sent again
    for name, tensor in trainer.saved(1, "after-one").items():
        torch.testing.assert_close(tensor, (weights[name] - 2 * weights[name].grad).detach(), rtol=1e-4, atol=1e-5)


def test_the_forward_pass_has_the_new_weights_from_a_step_on(trainer: Trainer) -> None:
    trainer.begin()
    trainer.backward(0)
    trainer.step(0, parts=1)
    saved = trainer.saved(1, "moved")
    expert = ExpertWeights(saved["layers.0.experts.1.w_in"], saved["layers.0.experts.1.w_out"])
    request = pb.ExchangeRequest(
        id=1, layer=0, dtype=pb.FLOAT32, num_rows=2, rows=ROWS.tobytes(), experts=[1], counts=[2],
        pair_rows=np.array([0, 1], np.int32).tobytes(),
    )  # fmt: skip
    (reply,) = trainer.host.Exchange(iter([request]), **CALL)
    rows = torch.frombuffer(bytearray(reply.rows), dtype=torch.float32).view(2, H)
    torch.testing.assert_close(rows, expert_ffn(CONFIG.spec, expert, torch.from_numpy(ROWS)), rtol=1e-4, atol=1e-5)


def test_who_is_not_in_step_is_told_so_and_nothing_is_done(trainer: Trainer) -> None:
    aborted = grpc.StatusCode.ABORTED
    assert refused(trainer.backward, 0, session=7) == (
        aborted,
        "the host is not in this session of training (any more)",
    )
    trainer.begin(session=2)
    assert refused(trainer.backward, 0) == (aborted, "the host is not in this session of training (any more)")
    assert refused(trainer.backward, 0, session=2, step=1) == (aborted, "the host is at step 0, not 1")
    assert refused(trainer.backward, 1, session=2)[1] == "part 1 of the gradients came, but not part 0"
    trainer.backward(0, session=2)
    assert refused(trainer.step, 0, parts=2, session=2) == (aborted, "the host has 1 parts of the gradients, not 2")
    assert refused(trainer.step, 0, parts=1, session=1)[0] is aborted
    assert trainer.step(0, parts=1, session=2) == 1
    trainer.fill()
    assert refused(trainer.step, 1, parts=0, session=2)[0] is aborted


BROKEN = {
    "short rows": ({"rows": b"\0" * 20}, "rows has 20 bytes"),
    "short gradients": ({"grad_rows": b"\0" * 8}, "grad_rows has 8 bytes: 3 pairs take 72"),
    "pair row out of range": ({"pair_rows": np.array([0, 1, 2], np.int32).tobytes()}, "in 0 to 1"),
    "expert unknown to the model": ({"experts": [1, 3]}, "below 3"),
    "expert held elsewhere": ({"experts": [1, 2]}, "expert 0:2 is not trained here"),
    "huge counts": ({"counts": [2**31, 2**31]}, "pairs"),
    "dtype": ({"dtype": pb.BFLOAT16}, "take float32"),
    "layer": ({"layer": 1}, "layer 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_part_is_refused_and_counts_for_nothing(trainer: Trainer, name: str) -> None:
    changes, text = BROKEN[name]
    trainer.begin()
    code, details = refused(trainer.backward, 0, **changes)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text in details
    assert trainer.step(0, parts=0) == 1


def test_orders_that_make_no_sense_are_refused(trainer: Trainer, tmp_path) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    assert refused(trainer.begin, session=0) == (invalid, "session: it must be above 0")
    assert refused(trainer.begin, optimizer=pb.Optimizer(name="adam"))[0] is invalid
    assert refused(trainer.begin, optimizer=pb.Optimizer(name="sgd", momentum=float("inf")))[0] is invalid
    code, details = refused(trainer.begin, step=3)
    assert (code, "is of step 0, not 3" in details) == (grpc.StatusCode.DATA_LOSS, True)
    trainer.begin()
    assert refused(trainer.step, 0, parts=0, rate=float("nan"))[0] is invalid

    def save(folder: str) -> tuple[grpc.StatusCode, str]:
        return refused(trainer.training.Save, pb.SaveRequest(session=1, step=0, folder=folder), **CALL)

    failed = grpc.StatusCode.FAILED_PRECONDITION
    for folder in ("", "new", "\0", str(trainer.root / "none"), str(tmp_path), f"{trainer.root}/.."):
        assert save(folder)[0] is failed
    assert "where this host was started to save" in save(str(tmp_path))[1]
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_was_not_started_for_it_is_not_trained() -> None:
    server = HostServer(Host(2**20), "token")
    with grpc.insecure_channel(server.address) as channel:
        message = pb.BeginRequest(session=1, optimizer=PLAIN)
        assert refused(TrainingStub(channel).Begin, message, **CALL)[0] is grpc.StatusCode.PERMISSION_DENIED
    server.close()


def test_training_must_fit_in_the_hosts_memory(served) -> None:
    _, root = served
    server = HostServer(Host(4200), "token", train=root)
    with grpc.insecure_channel(server.address) as channel:
        trainer = Trainer(channel, root)
        code, details = refused(trainer.begin, optimizer=pb.Optimizer(name="adamw", beta1=0.9, beta2=0.9))
    server.close()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "use more hosts, or give them more memory" in details
