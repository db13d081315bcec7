"""Quantized experts of the tiny model: what they cost in loss, how many more fit, and that hosts agree on them."""

from __future__ import annotations

import math
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertmesh._proto import host_pb2 as pb
from expertmesh._proto.host_pb2_grpc import HostStub
from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.checkpoint.read import ExpertReader
from expertmesh.families import find_experts
from expertmesh.hosts.configuration import configuration_for
from expertmesh.hosts.host import Host
from expertmesh.hosts.process import HostServer
from expertmesh.ids import ExpertId
from expertmesh.kernels import slot_bytes
from expertmesh.kernels.quantization import dequantize
from expertmesh.kernels.reference import ReferenceKernel
from expertmesh.kernels.selfcheck import probe_rows
from expertmesh.models import DOMAINS, heldout, tiny_path
from expertmesh.transport import codec
from expertmesh.transport.grpc_link import credentials

WINDOW = 384
WINDOWS = 2
MOST_LOSS = {"int8": 1.002, "fp8": 1.002, "fp8_block": 1.002, "int4_g32": 1.01, "int4_g64": 1.01, "int4_g128": 1.01}
"""Over that of dense weights."""


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids_BT() -> torch.Tensor:
    """The first windows of what the model was not trained on, of each domain."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    texts = [tokenizer(heldout(domain), return_tensors="pt").input_ids[0] for domain in DOMAINS]
    return torch.cat([ids[: WINDOWS * WINDOW].view(WINDOWS, WINDOW) for ids in texts])


@torch.no_grad()
def loss(model: Any, ids_BT: torch.Tensor) -> float:
    logits = model(input_ids=ids_BT, use_cache=False).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()))


def quantize_model(model: Any, weight_format: str) -> None:
    """Give it the weights that hosts would compute with."""
    index = index_checkpoint(tiny_path(), weight_format=weight_format)
    modules = [module for module, _ in find_experts(model).values()]
    with ExpertReader(tiny_path()) as reader:
        for expert, recipe in index.recipes.items():
            spec = index.specs[expert.layer]
            plain = dequantize(reader.read(recipe, spec), spec)
            modules[expert.layer].gate_up_proj.data[expert.index] = plain.w_in
            modules[expert.layer].down_proj.data[expert.index] = plain.w_out


def test_the_held_out_loss_of_quantized_experts(model, ids_BT, record_property):
    quantize_model(model, "dense")
    dense = loss(model, ids_BT)
    assert 3 < dense < math.log(3072) / 2
    for weight_format, most in MOST_LOSS.items():
        quantize_model(model, weight_format)
        ratio = loss(model, ids_BT) / dense
        record_property(weight_format, ratio)
        assert 1 - (most - 1) / 2 < ratio < most, weight_format
        assert ratio != 1


@pytest.mark.parametrize(("weight_format", "times"), [("int8", 2), ("fp8", 2)])
def test_more_quantized_experts_fit_into_a_host(weight_format, times):
    dense, quantized = (index_checkpoint(tiny_path(), weight_format=name) for name in ("dense", weight_format))
    host = Host(20 * slot_bytes(dense.specs[0]))
    assert host.configure(configuration_for(dense, "tiny")) == (20,)
    (slots,) = host.configure(configuration_for(quantized, "tiny"))
    assert 20 * times * 0.9 < slots <= 20 * times


@pytest.mark.parametrize("weight_format", ["int8", "int4_g32", "fp8_block"])
def test_hosts_load_and_answer_what_quantized_weights_stand_for(weight_format):
    index = index_checkpoint(tiny_path(), weight_format=weight_format)
    spec, expert = index.specs[0], ExpertId(1, 5)
    with ExpertReader(tiny_path()) as reader:
        oracle = ReferenceKernel(spec, 1)
        oracle.write(0, reader.read(index.recipes[expert], spec))
    x_RH = probe_rows(spec, 3)
    digests, answers = [], []
    for _ in range(2):
        server = HostServer(Host(2**24), "token")
        try:
            with grpc.insecure_channel(server.address) as channel:
                stub, metadata = HostStub(channel), credentials("token")
                stub.Configure(codec.encode_configuration(configuration_for(index, "tiny")), metadata=metadata)
                recipe = codec.encode_recipe(*expert, index.recipes[expert])
                digests.append(stub.Load(recipe, metadata=metadata).digest)
                request = pb.ExchangeRequest(
                    id=1,
                    layer=expert.layer,
                    dtype=pb.BFLOAT16,
                    num_rows=3,
                    rows=x_RH.view(torch.uint8).numpy().tobytes(),
                    experts=[expert.index],
                    counts=[3],
                    pair_rows=np.arange(3, dtype="<i4").tobytes(),
                )
                (reply,) = stub.Exchange(iter([request]), metadata=metadata, timeout=60)
                answers.append(torch.frombuffer(bytearray(reply.rows), dtype=torch.bfloat16).view(3, -1))
        finally:
            server.close()
    expected = oracle.run(x_RH, torch.arange(3), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(answers[0], expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(answers[0], answers[1])
    assert digests[0] == digests[1]
    assert digests[0].weights
