"""What in a config, or in what Ray Serve was told, lets strangers in: said once at the start, for it may be meant."""

from __future__ import annotations

import ipaddress
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expertmesh.config import MeshConfig


HAPROXY_SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
"""The variable that has Serve put HAProxy before the gateway, in place of its own proxy, when it is 1."""


def exposures(mesh: MeshConfig, http_host: str) -> list[str]:
    """One line for each. `http_host` is where the gateway listens."""
    found = []
    if mesh.network.listen == "node" and mesh.network.tls is None:
        found.append(
            "network: hosts listen to other machines, and what goes between them is not encrypted, the shared token "
            "included; `expertmesh certs` makes what network.tls needs, or let the network be your own"
        )
    if not _is_loopback(http_host) and not mesh.gateway.api_keys:
        found.append(
            f"gateway: HTTP listens at {http_host}, and whoever reaches it may use the model; `expertmesh key NAME` "
            "draws a key for gateway.api_keys"
        )
    if os.environ.get(HAPROXY_SWITCH) == "1":
        ports = [
            os.environ.get("RAY_SERVE_HAPROXY_STATS_PORT", "8404"),
            os.environ.get("RAY_SERVE_HAPROXY_METRICS_PORT", "9101"),
        ]
        found.append(f"Serve: HAProxy counts requests for all to see, at ports {' and '.join(ports)} of this machine")
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
