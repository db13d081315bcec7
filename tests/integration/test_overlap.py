"""Shared experts are computed while hosts compute the routed ones, and the model's answers stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from expertmesh.backbone import Backbone, load_backbone
from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.moe.layer import MoeLayer
from expertmesh.testing.processes import ProcessCluster
from tests.architectures.checkpoints import save_checkpoint
from tests.architectures.executor import HostExecutor

PROMPT = torch.tensor([[17, 99, 5, 64, 23, 110, 42, 8, 77, 31]])


@pytest.fixture(scope="module")
def executor() -> Iterator[HostExecutor]:
    with ProcessCluster(num_hosts=2) as cluster:
        yield HostExecutor(cluster)


class Watched:
    """A layer that writes down when its rows go and when they are waited for."""

    def __init__(self, layer: MoeLayer, log: list[str]) -> None:
        self._layer = layer
        self._log = log

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        raise AssertionError("called as if there were no shared experts")

    def begin(self, *arguments: torch.Tensor) -> Callable[[], torch.Tensor]:
        self._log.append("sent")
        finish = self._layer.begin(*arguments)

        def wait() -> torch.Tensor:
            self._log.append("waited")
            return finish()

        return wait


def watch_shared(backbone: Backbone, log: list[str]) -> None:
    """Note when the last product of each block's shared experts is computed."""
    for name, module in backbone.model.named_modules():
        if name.endswith(("shared_expert.down_proj", "shared_experts.down_proj")):
            module.register_forward_hook(lambda *_: log.append("shared"))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen2_moe"])
def test_shared_experts_are_computed_between_sending_and_waiting(
    model_type: str, executor: HostExecutor, tmp_path: Path
) -> None:
    """deepseek_v3 calls them after the routed experts, qwen2_moe before."""
    save_checkpoint(tmp_path, model_type)
    index, backbone = index_checkpoint(tmp_path), load_backbone(tmp_path)
    log: list[str] = []
    watch_shared(backbone, log)
    with executor.run(index) as layers, torch.no_grad():
        backbone.connect([lambda *arguments, layer=layer: layer(*arguments) for layer in layers])
        expected = backbone.model(input_ids=PROMPT).logits
        assert log == ["shared"] * index.num_layers
        log.clear()
        backbone.connect([Watched(layer, log) for layer in layers])
        assert torch.equal(backbone.model(input_ids=PROMPT).logits, expected)
        assert type(backbone.model(input_ids=PROMPT).logits) is torch.Tensor
    assert log == ["sent", "shared", "waited"] * 2 * index.num_layers


def test_a_block_without_shared_experts_waits_at_once(executor: HostExecutor, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "olmoe")
    index, backbone = index_checkpoint(tmp_path), load_backbone(tmp_path)
    with executor.run(index) as layers, torch.no_grad():
        backbone.connect([Watched(layer, []) for layer in layers])
        with pytest.raises(AssertionError, match="no shared experts"):
            backbone.model(input_ids=PROMPT)
