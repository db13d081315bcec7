"""A deployed mesh, as its users meet it: the command, real processes, the official client and curl."""

from __future__ import annotations

import json
import subprocess

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import expertmesh
from expertmesh.backbone import count_expert_parameters
from expertmesh.errors import ConfigError
from expertmesh.models import PROMPTS, tiny_path
from tests.integration.served import Served

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPT = PROMPTS["python"]


@pytest.fixture(scope="module")
def client(mesh: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def whole():
    """The same checkpoint in one process, experts and all."""
    return AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32).eval()


def greedy(whole, prompt: str, tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = whole.generate(ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_completions_equal_the_model_in_one_process(client: openai.OpenAI, whole) -> None:
    for prompt in PROMPTS.values():
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0)
        assert answer.choices[0].text == greedy(whole, prompt, 24)
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 24


def test_streams_say_what_unstreamed_answers_say(client: openai.OpenAI) -> None:
    options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0.8, "seed": 11}
    whole = client.completions.create(**options)
    pieces = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text
    assert pieces[-1].usage == whole.usage


def test_chat_streamed_and_unstreamed(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "In the beginning"}]
    options = {"model": "tiny", "messages": messages, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**options)
    pieces = list(client.chat.completions.create(**options, stream=True))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert text.strip()


def test_curl_gets_a_completion_and_a_stream(mesh: Served) -> None:
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0})
    command = ["curl", "-sS", f"{mesh.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    whole = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)
    streamed = json.dumps(json.loads(body) | {"stream": True})
    lines = subprocess.run([*command[:-1], streamed], check=True, capture_output=True, text=True, timeout=60).stdout
    events = [line.removeprefix("data: ") for line in lines.splitlines() if line]
    assert events[-1] == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    assert text == whole["choices"][0]["text"]


def test_the_mesh_describes_itself(mesh: Served) -> None:
    hosts = httpx.get(f"{mesh.url}/mesh/hosts").json()
    placement = httpx.get(f"{mesh.url}/mesh/placement").json()
    load = httpx.get(f"{mesh.url}/mesh/load").json()["layers"]
    assert len(hosts) == 2
    assert len({host["pid"] for host in hosts}) == 2
    assert {"id", "pool", "node", "pid", "slots", "replicas", "rate", "state"} <= set(hosts[0])
    assert sum(host["replicas"] for host in hosts) >= sum(placement["num_experts"])
    assert [len(layer) for layer in load] == placement["num_experts"]
    assert sum(map(sum, load)) == sum(host["rows"] for host in hosts) > 0
    (router,) = httpx.get(f"{mesh.url}/mesh/routers").json()
    assert 1 <= router["epoch"] <= placement["epoch"]
    assert router["avoided"] == []
    decisions = httpx.get(f"{mesh.url}/mesh/decisions").json()
    assert placement["epoch"] in [entry["epoch"] for entry in decisions if entry["what"] == "publish"]
    assert httpx.get(f"{mesh.url}/health").status_code == 200


def test_a_client_that_leaves_frees_its_place(mesh: Served) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{mesh.url}/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    # Were its 400 tokens still being made, this many rows would come in while nobody asks for any.
    mesh.wait_idle()
    before = mesh.rows()
    mesh.wait_idle()
    assert mesh.rows() == before


def test_attach_puts_the_experts_behind_a_script(mesh: Served, whole) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = whole.generate(ids, max_new_tokens=12, do_sample=False)
    with expertmesh.attach(model, mesh.url, token=mesh.token):
        assert count_expert_parameters(model) == 0
        before = mesh.rows()
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)
        assert mesh.rows() > before


def test_attach_refuses_another_model(mesh: Served) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny_path()).config
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    with pytest.raises(ConfigError, match="attach the model that the mesh serves"):
        expertmesh.attach(AutoModelForCausalLM.from_config(config, dtype=torch.float32), mesh.url, token=mesh.token)


def test_status_shows_the_hosts(mesh: Served) -> None:
    out = mesh.command("status", "--url", mesh.url, "--json")
    status = json.loads(out.stdout)
    assert status["model"]["id"] == "tiny"
    assert [host["id"] for host in status["hosts"]] == ["cpu-0", "cpu-1"]
