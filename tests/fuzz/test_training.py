"""A host that is trained, under any orders to train: the trainer that it has goes on after each, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh._proto import host_pb2 as pb
from expertmesh._proto.host_pb2_grpc import HostStub, TrainingStub
from expertmesh.checkpoint.layer_folder import index_layers, layer_config, new_folder
from expertmesh.hosts.configuration import configuration_for
from expertmesh.hosts.host import Host
from expertmesh.hosts.process import HostServer
from expertmesh.transport import codec
from expertmesh.transport.grpc_link import credentials
from tests.fuzz.fuzzing import edges, fuzzed, texts
from tests.fuzz.messages import EXPERTS, HIDDEN, LAYERS, UINT64, doubles, good, requests

CALL = {"metadata": credentials("token"), "timeout": 60}
SESSION = 77
DECIDED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.ABORTED,
}
PLAIN = pb.Optimizer(name="sgd")


class Trainer:
    """A good trainer, whose one part is sent over and over."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.training = TrainingStub(channel)
        self.expected = self.backward()

    def backward(self) -> bytes:
        self.training.Begin(pb.BeginRequest(session=SESSION, optimizer=PLAIN), **CALL)
        grads = np.linspace(-1, 2, 3 * HIDDEN, dtype=np.float32).tobytes()
        message = pb.BackwardRequest(session=SESSION, pairs=good(1), grad_rows=grads)
        return self.training.Backward(message, **CALL).grad_rows

    def check(self) -> None:
        assert self.backward() == self.expected

    def status(self, call, message) -> grpc.StatusCode | None:
        try:
            call(message, **CALL)
        except grpc.RpcError as error:
            return error.code()
        return None


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz-training")


@pytest.fixture(scope="module")
def trainer(root) -> Iterator[Trainer]:
    new_folder(root / "new", layer_config(hidden=HIDDEN, intermediate=8, num_experts=EXPERTS, num_layers=LAYERS))
    (root / "saved").mkdir()
    server = HostServer(Host(2**22), "token", train=root / "saved")
    with grpc.insecure_channel(server.address) as channel:
        host, index = HostStub(channel), index_layers(root / "new")
        host.Configure(codec.encode_configuration(configuration_for(index, str(root / "new"))), **CALL)
        for expert, recipe in index.recipes.items():
            if expert.index < 3:
                host.Load(codec.encode_recipe(expert.layer, expert.index, recipe), **CALL)
        yield Trainer(channel)
    server.close()


sessions, numbers = st.just(SESSION) | edges(UINT64), st.just(0) | edges(UINT64)


@fuzzed(80)
@given(
    sessions, numbers, numbers, requests(), st.binary(max_size=200) | st.integers(0, 24).map(lambda n: bytes(64 * n))
)
def test_any_part_is_decided_upon(trainer, session, step, part, pairs, grads) -> None:
    message = pb.BackwardRequest(session=session, step=step, part=part, pairs=pairs, grad_rows=grads)
    if (session, step, part) == (SESSION, 0, 1):
        message.part = 0  # it would be a good trainer's next
    assert trainer.status(trainer.training.Backward, message) in {None, *DECIDED}
    trainer.check()


optimizers = st.builds(
    pb.Optimizer,
    name=st.sampled_from(["sgd", "adamw", "", "adam"]) | texts,
    momentum=doubles,
    beta1=doubles,
    beta2=doubles,
    epsilon=doubles,
    weight_decay=doubles,
)


@fuzzed(60)
@given(sessions, numbers, optimizers)
def test_any_order_to_begin_is_decided_upon(trainer, session, step, optimizer) -> None:
    message = pb.BeginRequest(session=session, step=step, optimizer=optimizer)
    assert trainer.status(trainer.training.Begin, message) in {None, *DECIDED}
    trainer.check()


@fuzzed(40)
@given(sessions, numbers, edges(UINT64), doubles)
def test_any_order_to_step_is_decided_upon(trainer, session, step, parts, rate) -> None:
    message = pb.StepRequest(session=session, step=step, parts=parts + (parts == 1), learning_rate=rate)
    assert trainer.status(trainer.training.Step, message) in DECIDED
    trainer.check()


@fuzzed(40)
@given(sessions, numbers, st.sampled_from(["/", "/tmp", "..", "saved"]) | texts)
def test_any_order_to_save_writes_nothing_elsewhere(trainer, root, session, step, folder) -> None:
    message = pb.SaveRequest(session=session, step=step, folder=folder)
    assert trainer.status(trainer.training.Save, message) in DECIDED
    assert {path.name for path in root.iterdir()} == {"new", "saved"}
    trainer.check()
