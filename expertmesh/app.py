"""The composition root: from a config to a Ray Serve application.

`serve deploy configs/x.yaml` and `expertmesh serve configs/x.yaml` both come here.
"""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.config import BackpressureConfig, DeploymentActorConfig

from expertmesh.config import parse_config
from expertmesh.control.actor import ControllerActor
from expertmesh.credentials import shared_token
from expertmesh.exposure import exposures
from expertmesh.serve.deployments import CONTROLLER, GatewayDeployment, RouterDeployment

if TYPE_CHECKING:
    from expertmesh.config import MeshConfig

logger = logging.getLogger(__name__)

_ASIDE = 64
"""Requests at once that generate nothing: /metrics, /mesh and their like."""

_HEALTH: dict[str, Any] = {"health_check_period_s": 1, "health_check_timeout_s": 10}
"""Serve hears of the end of a process when it asks for its health, and starts another then."""


def build(args: dict[str, Any]) -> serve.Application:
    """What a config's `import_path` names: Serve calls it with `args`. Raises ConfigError naming the key."""
    mesh = parse_config(args, "args")
    for exposure in exposures(mesh, _http_host()):
        logger.warning(exposure)
    return application(mesh, secrets.token_hex(4))


def _http_host() -> str:
    """Where Serve listens, if it runs."""
    serving = serve.context._get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    return (serving and serving.http_config.host) or "127.0.0.1"


def application(mesh: MeshConfig, name: str) -> serve.Application:
    """The application of one mesh: gateway -> router, and the controller that the router deployment owns.

    `name` tells this deployment's hosts from all others on the cluster.
    """
    token = shared_token(make=True)
    config: dict[str, Any] = mesh.model_dump(mode="json")
    controller = DeploymentActorConfig(
        name=CONTROLLER,
        actor_class=ray.remote(ControllerActor),
        init_kwargs={"name": name, "config": config, "token": token},
        actor_options={"num_cpus": 0, "max_concurrency": 1000},
    )
    router = serve.deployment(
        RouterDeployment,
        name="router",
        num_replicas=mesh.router.replicas,
        ray_actor_options={"num_cpus": mesh.router.cpus, "num_gpus": mesh.router.gpus},
        # The engine has its own bounded queue and says 429 itself; Serve must not hold requests back before it.
        # One that is left alone has all requests, those that it resumes for the others included.
        max_ongoing_requests=mesh.gateway.replicas * mesh.places + _ASIDE,
        deployment_actors=[controller],
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=mesh.router.drain_s,
        max_surge_percent=100 if mesh.router.surge else 0,
        **_HEALTH,
    )
    at_once = mesh.gateway.max_ongoing_requests or mesh.places + _ASIDE
    gateway = serve.deployment(
        GatewayDeployment,
        name="gateway",
        num_replicas=mesh.gateway.replicas,
        ray_actor_options={"num_cpus": mesh.gateway.cpus},
        # The gateway refuses by itself what is too much; what Serve holds back before it must end somewhere too.
        max_ongoing_requests=at_once,
        max_queued_requests=at_once,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=mesh.gateway.drain_s,
        max_surge_percent=100,
        **_HEALTH,
    )
    return gateway.bind(config, router.bind(config, token), token)
