"""A router over real host processes, without Ray: what it says of itself is what it has done."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing

import pytest
import torch
from transformers import AutoModelForCausalLM

from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.checkpoint.source import resolve
from expertmesh.config import GateSection, MeshConfig, PoolSection
from expertmesh.engine.api import GenerateRequest, SamplingParams
from expertmesh.errors import ConfigError
from expertmesh.gates.spec import GateSpec
from expertmesh.serve.router import Router
from tests.integration.kept import running

NUM_TOKENS, NUM_LAYERS = 6, 4
CONFIG = MeshConfig(model="tiny", dtype="float32", pools=(PoolSection(hosts=2),))


PROMPT = (5, 6, 7, 300, 40, 1000)


def with_gate(**fields) -> MeshConfig:
    return CONFIG.model_copy(update={"gate": GateSection(strategy="softmax-topk", **fields)})


def logprobs_with(k: int) -> list[float]:
    """What transformers says of the prompt's tokens, with k experts for each."""
    model = AutoModelForCausalLM.from_pretrained(resolve("tiny"), dtype=torch.float32, num_experts_per_tok=k)
    with torch.no_grad():
        logprobs_TV = model(input_ids=torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    return [float(logprobs_TV[at, token]) for at, token in enumerate(PROMPT[1:])]


def generate(router: Router) -> int:
    """How many tokens came."""
    request = GenerateRequest(
        request_id="r", prompt_ids=(5, 6, 7), sampling=SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    )

    async def count() -> int:
        numbers = {number async for message in router.generate(request, "gateway") for number, _ in message}
        return len(numbers)

    return asyncio.run(count())


def test_the_controller_shows_what_a_router_has_done_and_whom_it_does_not_trust() -> None:
    index = index_checkpoint(resolve("tiny"), "float32")
    with running(index, experts={"min_replicas": 2, "elastic": False}) as mesh:
        # The first placement may name one copy of an expert, while the other is being loaded.
        mesh.wait(lambda: all(len(of) == 2 for of in mesh.exchange.placement.replicas.values()), "two copies of each")
        placement = mesh.exchange.placement
        with closing(Router(CONFIG, placement, mesh.cluster.token)) as router:
            idle = router.statistics()
            assert idle == {"epoch": placement.epoch, "avoided": []} | dict.fromkeys(
                idle.keys() - {"epoch", "avoided"}, 0
            )
            assert generate(router) == NUM_TOKENS
            mesh.wait(lambda: not router.statistics()["running"], "its end")
            done = router.statistics()
            assert (done["generated_tokens"], done["waiting"]) == (NUM_TOKENS, 0)
            assert done["requests"] >= NUM_LAYERS * NUM_TOKENS, "each layer asks at least one host for each token"
            mesh.cluster.kill("cpu-1")
            assert generate(router) == NUM_TOKENS
            bereft = router.statistics()
        assert "cpu-1" in bereft["avoided"]
        assert bereft["sent_again"] > done["sent_again"]
        assert json.loads(json.dumps(bereft)) == bereft
        mesh.ask(mesh.controller.hear_router("the-router", bereft))
        (shown,) = mesh.report("routers")
        assert shown.pop("age_s") >= 0
        assert shown == {"id": "the-router"} | bereft
        with pytest.raises(ConfigError, match=r"gate\.k is 17, but the layer has 16 experts: use at most as many"):
            Router(with_gate(k=17), placement, mesh.cluster.token)
        with closing(Router(with_gate(k=1, normalize=True), placement, mesh.cluster.token)) as router:
            scored = asyncio.run(router.score(PROMPT, 0))
            own = asyncio.run(router.score(PROMPT, 0, GateSpec(strategy="softmax-topk", k=2, normalize=True)))
        for by, k in ((scored, 1), (own, 2)):
            assert by.token_logprobs[1:] == pytest.approx(logprobs_with(k), abs=1e-3)
        assert scored.token_logprobs != own.token_logprobs
        placed = mesh.report("placement")
        assert (placed["hidden"], placed["dtype"]) == (index.specs[0].hidden, "float32")
