"""A host as a plain process, without Ray: `python -m expertmesh.hosts --memory 2GiB`.

Prints one JSON line with its address when it is ready, and ends when its standard input does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ByteSize, TypeAdapter

from expertmesh.allocator import LAUNCH_BYTES, keep_freed_memory
from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.credentials import shared_token
from expertmesh.errors import ExpertMeshError
from expertmesh.hosts.faults import Faults
from expertmesh.hosts.host import Host, MakeKernel
from expertmesh.hosts.process import HostServer, available_memory
from expertmesh.kernels import make_kernel
from expertmesh.tls import TlsFiles

if TYPE_CHECKING:
    from collections.abc import Callable


def main(make: MakeKernel = make_kernel, prepare: Callable[[Host], None] | None = None) -> None:
    """Parse the command line, serve until standard input ends. `prepare` fills the host before it is reached."""
    parser = argparse.ArgumentParser(prog="python -m expertmesh.hosts", description=__doc__)
    parser.add_argument("--bind", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=0, help="0 takes any free port")
    parser.add_argument("--device", default="cpu", help='"cpu" or "cuda[:N]"')
    parser.add_argument("--memory", default=None, help="for experts, such as 2GiB; default: most of what is free")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a launch")
    parser.add_argument(
        "--faults", action="store_true", help="let whoever has the token break it, to test what happens"
    )
    parser.add_argument(
        "--train", type=Path, metavar="FOLDER", help="let it be trained, by whoever has the token; it saves in FOLDER"
    )
    parser.add_argument("--tls", nargs=3, metavar=("CA", "CERTIFICATE", "KEY"), help="files in PEM; default: no TLS")
    arguments = parser.parse_args()
    try:
        token = shared_token()
    except ExpertMeshError as error:
        parser.error(str(error))

    tls = TlsFiles(**dict(zip(("ca", "certificate", "key"), arguments.tls, strict=True))) if arguments.tls else None
    keep_freed_memory(LAUNCH_BYTES)
    torch.set_num_threads(arguments.threads)
    memory = TypeAdapter(ByteSize).validate_python(arguments.memory) if arguments.memory else None
    faults = Faults(SYSTEM_CLOCK) if arguments.faults else None
    host = Host(
        memory or available_memory(arguments.device), arguments.device, faults.kernels(make) if faults else make
    )
    if prepare is not None:
        prepare(host)
    try:
        server = HostServer(
            host, token, bind=arguments.bind, port=arguments.port, tls=tls, faults=faults, train=arguments.train
        )
    except ExpertMeshError as error:
        parser.error(str(error))
    ready = {"address": server.address, "socket": server.socket, "process_id": os.getpid()}
    sys.stdout.write(json.dumps(ready) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.close()


if __name__ == "__main__":
    main()
