"""What loading a backbone costs in memory, measured in a process of its own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.architectures.checkpoints import save_checkpoint

INTERMEDIATE = 2**18
LOAD_AND_MEASURE = """
import resource, sys
from pathlib import Path
from expertmesh.backbone import load_backbone

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large = map(Path, sys.argv[1:])
load_backbone(small, dtype="bfloat16")
before = peak()
load_backbone(large, dtype="bfloat16")
print(peak() - before)
"""


def test_the_experts_never_take_memory_while_loading(tmp_path: Path):
    """The large checkpoint's experts are holes in a sparse file. Loading casts, so that what is read is also held:
    the whole model, loaded by transformers in the same way, takes 1.8 GB more than the small one.
    """
    small, large = tmp_path / "small", tmp_path / "large"
    model = save_checkpoint(small, "granitemoe")
    large.mkdir()
    config = json.loads((small / "config.json").read_text())
    (large / "config.json").write_text(json.dumps({**config, "intermediate_size": INTERMEDIATE}))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in load_file(small / "model.safetensors").items():
        if "_linear" not in name:
            header[name] = describe(list(tensor.shape), len(data))
            data += tensor.contiguous().numpy().tobytes()
    end = len(data)
    for layer in range(len(model.model.layers)):
        for name, shape in (("input_linear", [6, 2 * INTERMEDIATE, 32]), ("output_linear", [6, 32, INTERMEDIATE])):
            entry = describe(shape, end)
            header[f"model.layers.{layer}.block_sparse_moe.{name}.weight"] = entry
            end = entry["data_offsets"][1]
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (large / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded + data)
        file.truncate(8 + len(encoded) + end)

    run = [sys.executable, "-c", LOAD_AND_MEASURE, str(small), str(large)]
    grown = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)

    assert end > 2**30
    assert grown < 100 * 2**20


def describe(shape: list[int], start: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, start + 4 * math.prod(shape)]}
