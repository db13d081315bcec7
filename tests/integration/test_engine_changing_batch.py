"""Models with a state or an encoder, in a batch whose members come, go and are resumed while others run."""

from __future__ import annotations

import pytest

from expertmesh.backbone import load_backbone
from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.engine.api import TokenEvent
from expertmesh.errors import InvalidRequestError
from expertmesh.testing.processes import ProcessCluster
from tests.architectures.checkpoints import save_checkpoint
from tests.architectures.executor import HostExecutor
from tests.integration.engines import Inbox, generate, random_prompts, request, run, running, tiny

STATEFUL = ["jamba", "qwen3_next", "granitemoehybrid", "nemotron_h", "bailing_hybrid"]
ENCODED = ["switch_transformers", "nllb-moe"]


@pytest.mark.parametrize("model_type", STATEFUL + ENCODED)
def test_others_that_come_and_go_change_nothing(model_type: str):
    model = tiny(model_type)
    first, leaving, resumed, late, long = random_prompts(5, 5, 5, 5, 19)
    num_resumed = 4
    expected = {
        name: generate(model, prompt, 10, eos_token_id=-1)
        for name, prompt in {"first": first, "resumed": resumed, "late": late, "long": long}.items()
    }
    inbox = Inbox()
    greedy = {"max_tokens": 10, "ignore_eos": True}

    def on_event(event: TokenEvent) -> None:
        inbox(event)
        if event.request_id == "first" and len(inbox.tokens("first")) == 3:
            engine.cancel("leaving")
            prompt = resumed + expected["resumed"][:num_resumed]
            engine.submit(request("resumed", prompt, num_resumed=num_resumed, **greedy), inbox)
            engine.submit(request("late", late, **greedy), inbox)
            engine.submit(request("long", long, **greedy), inbox)

    with running(model, "simple") as engine:
        engine.submit(request("leaving", leaving, **greedy), inbox)
        engine.submit(request("first", first, **greedy), on_event)
        inbox.wait_finished(expected)
    written = {name: inbox.tokens(name) for name in expected}
    assert written == {**expected, "resumed": expected["resumed"][num_resumed:]}
    assert len(inbox.tokens("leaving")) <= 3


@pytest.mark.parametrize("model_type", ENCODED)
def test_an_encoder_decoder_writes_the_same_with_its_experts_elsewhere(model_type: str, tmp_path):
    model = save_checkpoint(tmp_path, model_type)
    index, backbone = index_checkpoint(tmp_path), load_backbone(tmp_path)
    prompts = random_prompts(9, 9, 14)
    with ProcessCluster(num_hosts=2) as cluster, HostExecutor(cluster).run(index) as layers:
        backbone.connect(layers)
        with running(backbone.model, "auto") as engine:
            inbox = run(engine, [request(str(n), prompt, ignore_eos=True) for n, prompt in enumerate(prompts)])
    for n, prompt in enumerate(prompts):
        assert inbox.tokens(str(n)) == generate(model, prompt, 12, eos_token_id=-1)


def test_a_translators_decoder_begins_with_the_target_language():
    model, [prompt] = tiny("nllb-moe"), random_prompts(6)
    model.generation_config.forced_bos_token_id = 99
    with running(model, "auto") as engine:
        inbox = run(engine, [request("a", prompt, max_tokens=5, ignore_eos=True)])
    assert [99, *inbox.tokens("a")] == generate(model, prompt, 6, eos_token_id=-1)


def test_the_prompt_of_an_encoder_has_no_score():
    with (
        running(tiny("switch_transformers"), "auto") as engine,
        pytest.raises(InvalidRequestError, match="encoder reads the prompt"),
    ):
        engine.score((3, 4, 5), 0)
