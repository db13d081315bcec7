"""A router over real host processes, without Ray: what it says of itself is what it has done."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing

from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.checkpoint.source import resolve
from expertmesh.config import MeshConfig, PoolSection
from expertmesh.engine.api import GenerateRequest, SamplingParams
from expertmesh.serve.router import Router
from tests.integration.kept import running

NUM_TOKENS, NUM_LAYERS = 6, 4
CONFIG = MeshConfig(model="tiny", dtype="float32", pools=(PoolSection(hosts=2),))


def generate(router: Router) -> int:
    """How many tokens came."""
    request = GenerateRequest(
        request_id="r", prompt_ids=(5, 6, 7), sampling=SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    )

    async def count() -> int:
        return sum([len(events) async for events in router.generate(request)])

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
        placed = mesh.report("placement")
        assert (placed["hidden"], placed["dtype"]) == (index.specs[0].hidden, "float32")
