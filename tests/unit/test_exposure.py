"""What is said at the start about who can reach a mesh."""

from __future__ import annotations

import pytest

from expertmesh.config import MeshConfig, parse_config
from expertmesh.exposure import exposures

TLS = {"ca": "ca.pem", "certificate": "certificate.pem", "key": "key.pem"}
KEYS = [{"name": "alice", "sha256": "0" * 64}]


@pytest.mark.parametrize(
    ("values", "http_host", "said"),
    [
        ({}, "127.0.0.1", []),
        ({}, "localhost", []),
        ({}, "::1", []),
        ({"network": {"listen": "node"}}, "127.0.0.1", ["network:"]),
        ({"network": {"listen": "node", "tls": TLS}}, "127.0.0.1", []),
        ({}, "0.0.0.0", ["gateway:"]),
        ({}, "10.0.0.7", ["gateway:"]),
        ({}, "mesh.example", ["gateway:"]),
        ({"gateway": {"api_keys": KEYS}}, "0.0.0.0", []),
        ({"network": {"listen": "node"}}, "::", ["network:", "gateway:"]),
    ],
)
def test_what_lets_strangers_in_is_said_in_one_line_each(values: dict, http_host: str, said: list[str]) -> None:
    lines = exposures(parse_config(values), http_host)
    assert [line.partition(" ")[0] for line in lines] == said
    assert not any("\n" in line for line in lines)


def test_by_default_nobody_but_this_machine_reaches_anything() -> None:
    assert MeshConfig().network.listen == "loopback"


def test_what_serves_haproxy_shows_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", "8505")
    assert "ports 8505 and 9101" in exposures(MeshConfig(), "127.0.0.1")[0]
