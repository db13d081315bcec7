"""`expertmesh bench gate`: its figures of the model's own gate are those of transformers, and the rows are counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from expertmesh.bench import gate
from expertmesh.bench.gate_picture import draw_gates
from expertmesh.models import tiny_path


def test_the_losses_are_the_models_and_the_rows_are_counted(tmp_path: Path) -> None:
    report = gate.run(rounds=1, windows=1, report=lambda phase: None)
    of = report["gates"]
    (ids,) = gate._windows()[:1]
    for name, k in (("its own", 2), ("softmax-topk 2", 2), ("softmax-topk 1", 1)):
        model = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32, num_experts_per_tok=k)
        with torch.no_grad():
            loss = model(input_ids=ids[None], labels=ids[None]).loss
        assert of[name]["loss"] == pytest.approx(float(loss), abs=1e-4)
        assert of[name]["rows_per_token"] == k
    assert of["dense"]["rows_per_token"] == 16
    assert 1 < of["threshold 0.5 of 2"]["rows_per_token"] < of["threshold 0.2 of 2"]["rows_per_token"] < 2
    assert of["switch 1"]["rows_per_token"] < 1
    assert {name for name, each in of.items() if each["depends_on_batch"]} == {
        name for name in of if name.startswith(("switch", "gshard", "expert-choice"))
    }
    for name in report["fulfilled_by"]:
        assert of[name]["rows_over_own"] <= 0.75
        assert of[name]["higher_loss"] <= 0.01
    draw_gates(report, tmp_path / "gate.svg")
    assert "threshold" in (tmp_path / "gate.svg").read_text()
