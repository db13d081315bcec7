"""Generates the stubs in this folder from protos/: `python expertmesh/_proto/generate.py [OUT]`.

Needs the grpcio-tools release below: an old one on purpose, because generated code imports with its own protobuf
version or newer, and many cluster images still carry an older protobuf. A test fails when the stubs are stale.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

GRPCIO_TOOLS = "1.68.1"
PACKAGE = Path(__file__).parent
PROTOS = PACKAGE.parents[1] / "protos"


def generate(out: Path) -> None:
    """Write `host_pb2.py`, `host_pb2.pyi` and `host_pb2_grpc.py` into `out`."""
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTOS}"]
    command += [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*command, *(str(proto) for proto in sorted(PROTOS.glob("*.proto")))], check=True)
    for stub in out.glob("*_pb2_grpc.py"):
        text = stub.read_text()
        stub.write_text(text.replace("import host_pb2 as", "from expertmesh._proto import host_pb2 as"))


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
