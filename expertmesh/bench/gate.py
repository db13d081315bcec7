"""`expertmesh bench gate`: what other gates than its own make of the tiny model: loss, expert rows, tokens per second.

The model reads its held-out text in windows as long as those that it was trained on, with the product's exchange and
kernel in this process. Every gate reads the same tokens; the speeds are of the processor time of one thread, and the
gates take turns. Knows nothing of how it is shown.

Shapes: N windows, L tokens of a window, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from expertmesh.backbone import Gates, load_backbone
from expertmesh.bench.measure import Spread, environment
from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.checkpoint.read import read_expert
from expertmesh.gates.choices import NO_EXPERT
from expertmesh.gates.spec import GateSpec
from expertmesh.hosts.configuration import configuration_for
from expertmesh.hosts.host import Host
from expertmesh.ids import HostId
from expertmesh.models import DOMAINS, heldout, tiny_path
from expertmesh.moe.exchange import Exchange
from expertmesh.moe.layer import MoeLayer
from expertmesh.placement import HostInfo, Placement
from expertmesh.serve.text import load_codec
from expertmesh.transport.local import LocalTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from expertmesh.backbone import Backbone, MoeLayerFn

OWN = "its own"
WINDOW = 384
"""What the model was trained on."""
BATCH = 4
"""Windows of one forward; gates with a capacity share it out among the tokens of these."""
WISH = {"fewer_rows": 0.25, "higher_loss": 0.01}
"""What we wish of a gate: so much less work, for so much higher a loss at most."""


def _gates() -> dict[str, GateSpec | None]:
    """By name, what makes sense for a model that was trained with 2 of 16 experts and weights that sum to one.

    They do here too, but for those that are plain and for switch, expert-choice and dense.
    """
    gates: dict[str, GateSpec | None] = {OWN: None}
    for k in (1, 2, 3, 4):
        gates[f"softmax-topk {k}"] = GateSpec(strategy="softmax-topk", k=k, normalize=True)
    for k in (1, 2):
        gates[f"softmax-topk {k}, plain"] = GateSpec(strategy="softmax-topk", k=k)
    gates["topk-softmax 2"] = GateSpec(strategy="topk-softmax", k=2)
    gates["sigmoid-topk 2"] = GateSpec(strategy="sigmoid-topk", k=2, normalize=True)
    for p in (0.3, 0.4, 0.5, 0.6, 0.7):
        gates[f"top-p {p:g} of 2"] = GateSpec(strategy="top-p", top_p=p, k=2, normalize=True)
    gates["top-p 0.7 of all"] = GateSpec(strategy="top-p", top_p=0.7, normalize=True)
    for ratio in (0.2, 0.3, 0.5, 0.7):
        gates[f"threshold {ratio:g} of 2"] = GateSpec(strategy="threshold", ratio=ratio, k=2, normalize=True)
    for factor in (1.0, 1.25, 2.0):
        gates[f"switch {factor:g}"] = GateSpec(strategy="switch", capacity_factor=factor)
        gates[f"gshard {factor:g}"] = GateSpec(strategy="gshard", capacity_factor=factor)
    gates["expert-choice 2"] = GateSpec(strategy="expert-choice", capacity_factor=2)
    gates["dense"] = GateSpec(strategy="dense")
    return gates


def run(*, rounds: int = 5, windows: int | None = None, report: Callable[[str], object] = print) -> dict[str, Any]:
    """Measure every gate. `windows` takes so many of the text's instead of all."""
    torch.set_num_threads(1)
    text_NL = _windows()
    text_NL = text_NL if windows is None else text_NL[:: max(1, len(text_NL) // windows)][:windows]
    backbone, rows = _model()
    gates, switch = _gates(), Gates(backbone)
    measured: dict[str, dict[str, Any]] = {}
    for name, spec in gates.items():
        report(f"the loss with {name}")
        rows.clear()
        loss = 0.0
        for batch_NL in torch.split(text_NL, BATCH):
            with switch.by_row([(spec, batch_NL.numel())]):
                loss += _loss(backbone.model, batch_NL)
        measured[name] = {
            "gate": None if spec is None else _told(spec),
            "depends_on_batch": spec is not None and not spec.is_alone,
            "loss": loss / (len(text_NL) * (WINDOW - 1)),
            "rows_per_token": sum(rows) / (text_NL.numel() * len(backbone.moe_modules)),
        }
    paces = _paces(backbone.model, switch, gates, text_NL[:BATCH], rounds, report)
    own = measured[OWN]
    for name, of in measured.items():
        of["higher_loss"] = round(of["loss"] / own["loss"] - 1, 5)
        of["rows_over_own"] = round(of["rows_per_token"] / own["rows_per_token"], 4)
        of["loss"], of["rows_per_token"] = round(of["loss"], 5), round(of["rows_per_token"], 4)
        of["tokens_per_second"] = Spread.of(paces[name]).to_json(1)
        of["pace_over_own"] = Spread.of([a / b for a, b in zip(paces[name], paces[OWN], strict=True)]).to_json(3)
    return {
        "bench": "gate",
        "environment": environment("expertmesh bench gate --json"),
        "model": {"name": "tiny", "experts": backbone.num_experts[0], "layers": len(backbone.num_experts)},
        "text": {"tokens": text_NL.numel(), "window": WINDOW, "batch": BATCH, "domains": list(DOMAINS)},
        "wish": WISH,
        "fulfilled_by": [name for name, of in measured.items() if _is_wished(of)],
        "gates": measured,
    }


def _is_wished(of: Mapping[str, Any]) -> bool:
    return (
        of["rows_over_own"] <= 1 - WISH["fewer_rows"]
        and of["higher_loss"] <= WISH["higher_loss"]
        and not of["depends_on_batch"]
    )


def _told(spec: GateSpec) -> dict[str, Any]:
    """What a config says for this gate."""
    defaults = {field: of.default for field, of in GateSpec.__dataclass_fields__.items()}
    told = {name: value for name, value in asdict(spec).items() if value != defaults[name]}
    return told if spec.is_alone else told | {"depends_on_batch": True}


def _windows() -> torch.Tensor:
    """The held-out text of all domains, int64; what fills no window at a domain's end is left out."""
    codec = load_codec(tiny_path())
    assert codec is not None, "the tiny model has a tokenizer"
    of_domains = []
    for domain in DOMAINS:
        ids = codec.encode(heldout(domain), add_special_tokens=False)
        of_domains.append(torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).reshape(-1, WINDOW))
    return torch.cat(of_domains)


def _model() -> tuple[Backbone, list[int]]:
    """The tiny model in float32 over one host in this process, and the list to which each layer adds its rows."""
    index = index_checkpoint(tiny_path(), "float32")
    host = Host(memory_bytes=2**30)
    configuration = configuration_for(index, str(tiny_path()))
    host.configure(configuration)
    for expert, recipe in index.recipes.items():
        host.write(expert, read_expert(tiny_path(), recipe, configuration.spec(expert.layer)))
    info = HostInfo(id=HostId("here"), address="here")
    placement = Placement(
        epoch=1, hosts=(info,), num_experts=index.num_experts, replicas=dict.fromkeys(index.recipes, (info.id,))
    )
    exchange = Exchange(LocalTransport({info.id: host}), placement)
    rows: list[int] = []

    def counted(layer: MoeLayerFn) -> MoeLayerFn:
        def compute(x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
            rows.append(int((index_TK != NO_EXPERT).sum()))
            return layer(x_TH, index_TK, weights_TK)

        return compute

    backbone = load_backbone(tiny_path(), dtype="float32")
    backbone.connect([counted(MoeLayer(exchange, layer)) for layer in range(len(backbone.moe_modules))])
    return backbone, rows


@torch.inference_mode()
def _loss(model: Any, batch_NL: torch.Tensor) -> float:
    """The sum over the windows' tokens but the first of their losses, in nats."""
    logits_NLV = model(input_ids=batch_NL, use_cache=False).logits
    logits = logits_NLV[:, :-1].flatten(0, 1).float()
    return float(torch.nn.functional.cross_entropy(logits, batch_NL[:, 1:].flatten(), reduction="sum"))


def _paces(
    model: Any,
    switch: Gates,
    gates: Mapping[str, GateSpec | None],
    batch_NL: torch.Tensor,
    rounds: int,
    report: Callable[[str], object],
) -> dict[str, list[float]]:
    """By gate, tokens per second of processor time in each round."""
    paces: dict[str, list[float]] = {name: [] for name in gates}
    for number in range(rounds):
        report(f"speeds, round {number + 1} of {rounds}")
        for name, spec in gates.items():
            with torch.inference_mode(), switch.by_row([(spec, batch_NL.numel())]):
                began_s = time.thread_time()
                model(input_ids=batch_NL, use_cache=False)
                paces[name].append(batch_NL.numel() / (time.thread_time() - began_s))
    return paces
