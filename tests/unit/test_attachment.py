"""A model and a mesh that do not fit are told apart before anything is changed: against a real socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from transformers import AutoModelForCausalLM

import expertmesh
from expertmesh.attachment import look_up
from expertmesh.backbone import count_expert_parameters
from expertmesh.errors import ConfigError
from expertmesh.models import tiny_path
from expertmesh.testing.http_server import listening

EMPTY = b'{"epoch": 3, "num_experts": [16, 16, 16, 16], "hosts": [], "hidden": 96, "dtype": "bfloat16"}'


@contextmanager
def answering(body: bytes) -> Iterator[str]:
    app = Starlette(routes=[Route("/mesh/placement", lambda _: Response(body, media_type="application/json"))])
    with listening(app) as url:
        yield url


def test_a_model_of_another_type_is_refused_and_stays_whole():
    model = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)
    before = count_expert_parameters(model)
    assert before > 0
    with answering(EMPTY) as url, pytest.raises(ConfigError) as refused:
        expertmesh.attach(model, url, token="t")
    assert str(refused.value) == (
        f"model: it computes in float32, the experts of the mesh at {url} in bfloat16; load the model with "
        "dtype=torch.bfloat16"
    )
    assert count_expert_parameters(model) == before


def test_a_mesh_says_where_its_experts_are_and_which_rows_they_take():
    with answering(EMPTY) as url:
        served = look_up(f"{url}/")
    assert (served.placement.epoch, served.placement.num_experts) == (3, (16,) * 4)
    assert (served.hidden, served.dtype) == (96, "bfloat16")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>", "no mesh answers at"),
        (b"[" * 100_000, "no mesh answers at"),
        (b"[]", "is no mesh"),
        (b"{}", "is no mesh"),
        (EMPTY.replace(b"96", b"0"), "does not say which rows it takes"),
        (EMPTY.replace(b"96", b"true"), "does not say which rows it takes"),
        (EMPTY.replace(b"bfloat16", b"int4"), "does not say which rows it takes"),
        (EMPTY.replace(b'"bfloat16"', b"{}"), "does not say which rows it takes"),
        (EMPTY.replace(b"dtype", b"type"), "does not say which rows it takes"),
    ],
)
def test_what_is_no_answer_of_a_mesh_is_one_line_with_the_address(body, message):
    with answering(body) as url, pytest.raises(ConfigError) as refused:
        look_up(url)
    assert message in str(refused.value)
    assert url in str(refused.value)
    assert "\n" not in str(refused.value)


def test_where_no_mesh_is_one_line_says_so():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"no mesh answers at {nobody}/mesh/placement"):
        look_up(nobody)
