"""Mutual TLS between real processes and sockets: who gets in, who does not, and what a rotation disturbs."""

from __future__ import annotations

import asyncio
import datetime
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from cryptography import x509

from expertmesh._proto import host_pb2 as pb
from expertmesh._proto.host_pb2_grpc import HostStub
from expertmesh.authority import Authority
from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.errors import ConfigError, ReplicaUnavailableError
from expertmesh.hosts.process import HostProcess, HostServer
from expertmesh.ids import ExpertId, HostId
from expertmesh.kernels.spec import ExpertSpec
from expertmesh.placement import HostInfo
from expertmesh.testing.experts import SILU, Mixture
from expertmesh.tls import HOST_NAME, Identity, TlsFiles, read_identity
from expertmesh.transport import LayerRequest
from expertmesh.transport.grpc_control import GrpcHostControl
from expertmesh.transport.grpc_link import credentials
from expertmesh.transport.network import NetworkTransport

MIXTURE = Mixture(ExpertSpec(hidden=16, intermediate=24, activation=SILU), 1, 2)
TOKEN = "token"


def make_authority(folder: Path) -> Authority:
    authority = Authority(folder)
    authority.make()
    authority.issue(30)
    return authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return make_authority(tmp_path / "ours")


@pytest.fixture
def stranger(tmp_path: Path) -> Identity:
    return read_identity(make_authority(tmp_path / "theirs").files)


@pytest.fixture
def server(authority: Authority) -> Iterator[HostServer]:
    running = HostServer(MIXTURE.host([ExpertId(0, 0), ExpertId(0, 1)]), TOKEN, tls=authority.files)
    yield running
    running.close()


def info_of(server: HostServer | HostProcess) -> HostInfo:
    return HostInfo(id=HostId("h"), address=server.address, socket=server.socket)


def request(seed: int = 0) -> LayerRequest:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)).view(torch.uint8).numpy()
    return LayerRequest(0, "float32", x, np.arange(3, dtype=np.int32), [1], [3])


class Router:
    """A good client: asks over one open stream, and checks every answer."""

    def __init__(self, server: HostServer | HostProcess, tls: TlsFiles | None, token: str = TOKEN) -> None:
        self._transport = NetworkTransport(token, local_sockets=False, tls=tls)
        self._info = info_of(server)
        self._reference = MIXTURE.host([ExpertId(0, 0), ExpertId(0, 1)])

    def ask(self) -> None:
        asked = request()
        ticket = self._transport.send(self._info, asked)
        (answer,) = self._transport.receive(20)
        assert answer.ticket == ticket
        if isinstance(answer.outcome, Exception):
            raise answer.outcome
        expected = self._reference.compute([self._reference.prepare(asked)])[0]
        assert answer.outcome.rows.tobytes() == expected.rows.tobytes()

    def close(self) -> None:
        self._transport.close()


def call(server: HostServer, identity: Identity | None, *, name: str = HOST_NAME) -> pb.StatisticsReply:
    """One call of a plain gRPC client with the token."""
    if identity is None:
        channel = grpc.insecure_channel(server.address)
    else:
        trust = grpc.ssl_channel_credentials(identity.ca, identity.key or None, identity.certificate or None)
        options = (("grpc.ssl_target_name_override", name), ("grpc.use_local_subchannel_pool", 1))
        channel = grpc.secure_channel(server.address, trust, options)
    with channel:
        return HostStub(channel).Statistics(pb.StatisticsRequest(), metadata=credentials(TOKEN), timeout=20)


def expired(authority: Authority, tmp_path: Path) -> Identity:
    """A certificate of the same authority whose time is over."""

    class Yesterday:
        def monotonic(self) -> float:
            return SYSTEM_CLOCK.monotonic()

        def wall(self) -> float:
            return SYSTEM_CLOCK.wall() - 2 * 86_400

    kept = read_identity(authority.files)
    Authority(Path(authority.key_file).parent, Yesterday()).issue(1)
    files = authority.files
    old = Identity(ca=kept.ca, certificate=Path(files.certificate).read_bytes(), key=Path(files.key).read_bytes())
    authority.issue(30)
    assert x509.load_pem_x509_certificate(old.certificate).not_valid_after_utc < datetime.datetime.now(datetime.UTC)
    return old


def test_with_a_certificate_and_the_token_rows_and_orders_pass(server: HostServer, authority: Authority) -> None:
    with closing(Router(server, authority.files)) as router:
        router.ask()

    async def statistics() -> int:
        control = GrpcHostControl(info_of(server), TOKEN, tls=authority.files)
        try:
            return len((await control.statistics()).replicas)
        finally:
            await control.close()

    assert asyncio.run(statistics()) == 2


@pytest.mark.parametrize("who", ["another authority's", "none", "an expired one", "no TLS at all"])
def test_without_a_certificate_nobody_gets_in_and_nobody_else_notices(
    server: HostServer, authority: Authority, stranger: Identity, tmp_path: Path, who: str
) -> None:
    ours = read_identity(authority.files)
    identity = {
        "another authority's": Identity(ca=ours.ca, certificate=stranger.certificate, key=stranger.key),
        "none": Identity(ca=ours.ca, certificate=b"", key=b""),
        "an expired one": expired(authority, tmp_path),
        "no TLS at all": None,
    }[who]
    with closing(Router(server, authority.files)) as router:
        router.ask()
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as refused:
                call(server, identity)
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
            router.ask()
        router.ask()


def test_a_certificate_does_not_replace_the_token(
    server: HostServer, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(Router(server, authority.files)) as router, closing(Router(server, authority.files, "wrong")) as bad:
        for _ in range(5):
            with pytest.raises(ReplicaUnavailableError, match="UNAUTHENTICATED"):
                bad.ask()
            router.ask()
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "refused ipv4:127.0.0.1: wrong or missing token"
    ]


def test_a_router_does_not_talk_to_a_host_of_another_authority(server: HostServer, tmp_path: Path) -> None:
    theirs = make_authority(tmp_path / "theirs")
    with (
        closing(Router(server, theirs.files)) as router,
        pytest.raises(ReplicaUnavailableError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        router.ask()


def test_a_router_does_not_talk_to_a_host_without_tls(authority: Authority) -> None:
    """It must not send its token in the clear because somebody else answers at the address."""
    with socket.create_server(("127.0.0.1", 0)) as imposter:
        heard = bytearray()
        transport = NetworkTransport(TOKEN, tls=authority.files)
        address = f"127.0.0.1:{imposter.getsockname()[1]}"
        with closing(transport):
            transport.send(HostInfo(id=HostId("h"), address=address), request())
            transport.receive(0.2)
            connection, _ = imposter.accept()
            with connection:
                connection.settimeout(5)
                heard += connection.recv(65536)
                connection.sendall(b"HTTP/2 without TLS, says the imposter")
                transport.receive(20)
        assert heard[:1] == b"\x16"  # a TLS handshake
        assert TOKEN.encode() not in heard


def test_a_certificate_in_another_name_is_no_hosts(server: HostServer, authority: Authority) -> None:
    identity = read_identity(authority.files)
    assert call(server, identity)
    with pytest.raises(grpc.RpcError):
        call(server, identity, name="other.expertmesh")


def test_the_local_socket_needs_no_certificate_but_the_token(server: HostServer) -> None:
    transport = NetworkTransport(TOKEN)
    with closing(transport):
        transport.send(info_of(server), request())
        (answer,) = transport.receive(20)
    assert not isinstance(answer.outcome, Exception)


def test_a_renewed_certificate_is_what_new_connections_see_and_streams_go_on(
    server: HostServer, authority: Authority
) -> None:
    before = served_certificate(server, authority.files)
    with closing(Router(server, authority.files)) as router:
        for _ in range(3):
            router.ask()
            authority.issue(30)
            renewed = x509.load_pem_x509_certificate(Path(authority.files.certificate).read_bytes())
            seen = served_certificate(server, authority.files)
            assert seen.serial_number == renewed.serial_number != before.serial_number
            router.ask()  # over the stream it had
            with closing(Router(server, authority.files)) as newcomer:
                newcomer.ask()


def test_a_controller_goes_on_with_the_renewed_certificate(server: HostServer, authority: Authority) -> None:
    async def ask_across_a_renewal() -> None:
        control = GrpcHostControl(info_of(server), TOKEN, tls=authority.files)
        try:
            await control.statistics()
            authority.issue(30)
            await control.statistics()
            assert len(control._channels) == 2
        finally:
            await control.close()

    asyncio.run(ask_across_a_renewal())


def test_files_that_are_damaged_while_it_serves_change_nothing(server: HostServer, authority: Authority) -> None:
    before = served_certificate(server, authority.files)
    identity = read_identity(authority.files)
    Path(authority.files.certificate).write_bytes(b"nothing")
    assert call(server, identity)
    Path(authority.files.key).unlink()
    assert call(server, identity)
    assert before.serial_number == x509.load_pem_x509_certificate(identity.certificate).serial_number


def test_a_host_process_serves_with_its_files_and_ends_with_one_line_without_them(
    authority: Authority, capfd: pytest.CaptureFixture[str]
) -> None:
    with HostProcess(TOKEN, memory="64MiB", tls=authority.files) as process:

        async def statistics() -> None:
            control = GrpcHostControl(info_of(process), TOKEN, tls=authority.files)
            try:
                await control.statistics()
            finally:
                await control.close()

        asyncio.run(statistics())
    Path(authority.files.key).chmod(0o644)
    capfd.readouterr()
    with pytest.raises(RuntimeError, match="ended before it was ready"):
        HostProcess(TOKEN, memory="64MiB", tls=authority.files)
    assert "error: network.tls.key: others can read" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("start", [
    lambda files: HostServer(MIXTURE.host([]), TOKEN, tls=files),
    lambda files: NetworkTransport(TOKEN, tls=files),
], ids=["host", "router"])  # fmt: skip
def test_missing_files_are_told_at_the_start(authority: Authority, start: Callable[[TlsFiles], object]) -> None:
    Path(authority.files.ca).unlink()
    with pytest.raises(ConfigError, match=r"^network\.tls\.ca: .*No such file"):
        start(authority.files)


def served_certificate(server: HostServer, files: TlsFiles) -> x509.Certificate:
    """What a host shows to who connects now."""
    context = ssl.create_default_context(cafile=files.ca)
    context.load_cert_chain(files.certificate, files.key)
    context.set_alpn_protocols(["h2"])
    host, port = server.address.split(":")
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain, server_hostname=HOST_NAME) as connection,
    ):
        shown = connection.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown)
