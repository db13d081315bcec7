"""The composition root: from a config to a Ray Serve application.

`serve deploy configs/x.yaml` and `expertmesh serve configs/x.yaml` both come here.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.config import DeploymentActorConfig

from expertmesh.config import parse_config
from expertmesh.control.actor import ControllerActor
from expertmesh.credentials import shared_token
from expertmesh.serve.deployments import CONTROLLER, GatewayDeployment, RouterDeployment

if TYPE_CHECKING:
    from expertmesh.config import MeshConfig


def build(args: dict[str, Any]) -> serve.Application:
    """What a config's `import_path` names: Serve calls it with `args`. Raises ConfigError naming the key."""
    return application(parse_config(args, "args"), secrets.token_hex(4))


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
        max_ongoing_requests=mesh.router.max_requests + mesh.router.max_queue + 64,
        deployment_actors=[controller],
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=30,
    )
    gateway = serve.deployment(
        GatewayDeployment,
        name="gateway",
        num_replicas=mesh.gateway.replicas,
        ray_actor_options={"num_cpus": mesh.gateway.cpus},
        max_ongoing_requests=mesh.gateway.max_ongoing_requests,
        graceful_shutdown_timeout_s=30,
    )
    return gateway.bind(config, router.bind(config, token), token)
