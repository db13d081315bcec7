"""Generates the stubs in this folder from protos/: `python expertmesh/_proto/generate.py`.

It uses an old grpcio-tools on purpose, in an environment of its own: generated code imports with its own protobuf
version or newer, and many cluster images still carry an older protobuf. `DIGEST` ties the stubs to the protos that
they were made from, so that a test can tell when they are stale without the tools.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

GRPCIO_TOOLS = "1.68.1"
PACKAGE = Path(__file__).parent
PROTOS = PACKAGE.parents[1] / "protos"
DIGEST = PACKAGE / "DIGEST"


def digest() -> str:
    """A line for each file that has to agree with the others: the protos and the stubs."""
    files = [*sorted(PROTOS.glob("*.proto")), *sorted(PACKAGE.glob("*_pb2*.py*"))]
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in files]
    return "\n".join([f"grpcio-tools {GRPCIO_TOOLS}", *lines, ""])


def generate() -> None:
    """Write `host_pb2.py`, `host_pb2.pyi`, `host_pb2_grpc.py` and `DIGEST`."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = f"{folder}/bin/python"
        tools = [f"grpcio-tools=={GRPCIO_TOOLS}", "setuptools<81"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *tools], check=True)
        command = [python, "-m", "grpc_tools.protoc", f"--proto_path={PROTOS}"]
        command += [f"--{kind}_out={PACKAGE}" for kind in ("python", "pyi", "grpc_python")]
        subprocess.run([*command, *(str(proto) for proto in sorted(PROTOS.glob("*.proto")))], check=True)
    for stub in PACKAGE.glob("*_pb2_grpc.py"):
        stub.write_text(stub.read_text().replace("import host_pb2 as", "from expertmesh._proto import host_pb2 as"))
    DIGEST.write_text(digest())


if __name__ == "__main__":
    generate()
