"""The committed stubs are what protos/ says, and import with older releases of protobuf and grpcio."""

from __future__ import annotations

import re

from expertmesh._proto import host_pb2
from expertmesh._proto.generate import DIGEST, PACKAGE, PROTOS, digest


def test_stubs_are_not_stale() -> None:
    assert DIGEST.read_text() == digest(), "run `make protos` and commit what it writes"


def test_the_stubs_know_every_message_of_the_protocol() -> None:
    text = re.sub(r"//.*", "", (PROTOS / "host.proto").read_text())
    top_level = set(re.findall(r"^message (\w+)", text, flags=re.MULTILINE))
    assert top_level == set(host_pb2.DESCRIPTOR.message_types_by_name)


def test_stubs_import_with_protobuf_5_and_grpcio_1_68() -> None:
    made_by = re.search(r"Protobuf Python Version: (\d+)", (PACKAGE / "host_pb2.py").read_text())
    assert made_by is not None
    assert int(made_by[1]) <= 5
    needs = re.search(r"GRPC_GENERATED_VERSION = '1\.(\d+)", (PACKAGE / "host_pb2_grpc.py").read_text())
    assert needs is not None
    assert int(needs[1]) <= 68
