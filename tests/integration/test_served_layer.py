"""A layer whose experts a mesh serves: by the mesh's address, for inference."""

from __future__ import annotations

import json

import pytest
import torch
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

import expertmesh
from expertmesh.credentials import TOKEN_VARIABLE
from expertmesh.errors import ConfigError
from expertmesh.gates.spec import GateSpec
from expertmesh.hosts.process import HostServer
from expertmesh.ids import ExpertId, HostId
from expertmesh.kernels.spec import ExpertSpec
from expertmesh.placement import HostInfo, Placement
from expertmesh.testing.experts import SILU, Mixture
from expertmesh.testing.http_server import listening

HIDDEN, EXPERTS = 8, 4
MIXTURE = Mixture(ExpertSpec(hidden=HIDDEN, intermediate=12, activation=SILU), 1, EXPERTS)
HELD = [ExpertId(0, index) for index in range(EXPERTS)]


def test_the_experts_of_a_mesh_answer_and_the_gate_learns_from_them(monkeypatch) -> None:
    server = HostServer(MIXTURE.host(HELD), "token")
    info = HostInfo(id=HostId("a"), address=server.address, socket=server.socket)
    placement = Placement(epoch=1, hosts=(info,), num_experts=(EXPERTS,), replicas=dict.fromkeys(HELD, (info.id,)))
    body = json.dumps(placement.to_json() | {"hidden": HIDDEN, "dtype": "float32"})
    app = Starlette(routes=[Route("/mesh/placement", lambda _: Response(body, media_type="application/json"))])
    monkeypatch.setenv(TOKEN_VARIABLE, "token")
    with listening(app) as url:
        layer = expertmesh.MoELayer(url, GateSpec(strategy="softmax-topk", num_experts=EXPERTS, k=2))
        x_TH = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
        y_TH = layer(x_TH)
        choices = layer.choices
        expected = MIXTURE.dense(0, x_TH, choices.index_TK, choices.weights_TK.detach())
        torch.testing.assert_close(y_TH, expected, rtol=1e-4, atol=1e-5)
        y_TH.sum().backward()
        assert layer.gate.weight.grad.abs().sum() > 0
        with pytest.raises(ConfigError, match="these experts are served, not trained"):
            layer(x_TH.requires_grad_()).sum().backward()
        layer.experts.close()
    server.close()
