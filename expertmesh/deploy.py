"""Deploying a mesh from a program: start or join Ray, run the application, wait until it is ready, drain, stop.

What `serve deploy` does on a cluster, with progress and with errors that a person can act on.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import secrets
import socket
import threading
from typing import TYPE_CHECKING, Any

import httpx
import ray
from ray import serve
from ray._private.authentication import authentication_token_setup
from ray._private.ray_logging import stdout_deduplicator
from ray.serve.schema import ApplicationStatus

from expertmesh.app import application
from expertmesh.checkpoint.source import resolve, stored_tensors
from expertmesh.config import MeshConfig, parse_config
from expertmesh.config_file import ServeFile
from expertmesh.control.ray_cluster import end_hosts
from expertmesh.errors import ConfigError
from expertmesh.exposure import exposures
from expertmesh.progress import Progress
from expertmesh.serve.deployments import CONTROLLER
from expertmesh.tls import read_identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_HEALTH_TRIES = 150
_BUSY = {ApplicationStatus.NOT_STARTED, ApplicationStatus.DEPLOYING}


def for_model(model: str, *, hosts: int, min_replicas: int, dtype: str | None) -> ServeFile:
    """What `serve MODEL` deploys when no file says otherwise: hosts on this machine's CPU, or on each of its GPUs."""
    mesh: dict[str, Any] = {"model": model, "experts": {"min_replicas": min_replicas}, "pools": [{"hosts": hosts}]}
    if dtype is not None:
        mesh["dtype"] = dtype
    return ServeFile(serve={}, app_name="expertmesh", route_prefix="/", mesh=parse_config(mesh, "command line"))


@contextlib.contextmanager
def deployed(file: ServeFile, *, port: int | None = None, report: Callable[[Progress], None]) -> Iterator[str]:
    """The base URL of the mesh, which is drained and stopped on leaving; so is Ray, if this started it.

    Raises ConfigError or CheckpointError, with nothing left running, when it cannot come up.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # its progress is reported here
    # Ray prints it to standard output when a process dies, whatever it was told; the decision log has it.
    stdout_deduplicator.skip_re = re.compile("")
    # A model that is not all there is better told of before minutes are spent on a cluster.
    stored_tensors(resolve(file.mesh.model))
    options = file.serve.get("http_options") or {}
    listen = options.get("host") or "127.0.0.1", port or options.get("port") or 8000
    cluster = ray._private.services.canonicalize_bootstrap_address(None)
    if cluster is None:
        _check_port(*listen)
    if (tls := file.mesh.network.tls_files) is not None:
        read_identity(tls)
    for exposure in exposures(file.mesh, listen[0]):
        logger.warning(exposure)
    report(Progress(phase="starting Ray" if cluster is None else "joining Ray"))
    _start_ray(file.mesh) if cluster is None else _join_ray(cluster)
    try:
        report(Progress(phase="starting Serve"))
        address = _start_serve(listen, port)
        mesh = secrets.token_hex(4)
        target = serve.RunTarget(
            target=application(file.mesh, mesh), name=file.app_name, route_prefix=file.route_prefix
        )
        serve.run_many([target], wait_for_applications_running=False, wait_for_ingress_deployment_creation=False)
        try:
            _wait_ready(file.app_name, report)
            url = f"http://{address}{file.route_prefix.rstrip('/')}"
            _wait_answering(url)
            yield url
        finally:
            report(Progress(phase="stopping"))
            serve.delete(file.app_name)
            end_hosts(mesh)
    finally:
        # Serve tells clusters apart by a job's number, and each begins with the same: it would take the next for this.
        serve.context._set_global_client(None)
        ray.shutdown()


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"port {port} on {host}: {error.strerror}; choose another with --port") from error


_QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": "expertmesh"}


def _start_ray(mesh: MeshConfig) -> None:
    """A cluster of this machine, which ends with this process."""
    # A laptop may have fewer cores than the mesh has parts: Ray's CPUs only count places here.
    num_cpus = max(os.cpu_count() or 1, math.ceil(_cpus(mesh)))
    # Ray lets its processes start at full priority and then lowers it: each start would stop those that serve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Serve notices that our controller has died when it looks, which is every 10 s unless told otherwise.
    os.environ.setdefault("RAY_SERVE_DEPLOYMENT_ACTOR_HEALTH_CHECK_PERIOD_S", "2")
    # Before a gateway ends, Serve gives balancers half a minute to learn of it. There is none but its own here.
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "2")
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **_QUIET)


def _join_ray(address: str) -> None:
    """The cluster that RAY_ADDRESS names, or that `ray start` runs on this machine."""
    # `ray start` asks for the token of this machine's user when there is one; joining does not offer it by itself.
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        ray.init(address=address, **_QUIET)
        # Ray checks this for its nodes, but not for a program that joins; it would fail later, and obscurely.
        metadata = ray._common.usage.usage_lib.get_cluster_metadata(ray._private.worker.global_worker.gcs_client)
        ray._private.utils.check_version_info(metadata, "this machine")
    except (RuntimeError, ConnectionError, ValueError) as error:
        ray.shutdown()
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot join the Ray cluster at {address}: {reason}") from error


def _start_serve(listen: tuple[str, int], wanted_port: int | None) -> str:
    """Where Serve listens: as asked for, or, when the cluster runs Serve already, as it does."""
    running = serve.context._get_global_client(raise_if_no_controller_running=False)
    if running is not None:
        host, port = running.http_config.host, running.http_config.port
        if wanted_port not in (None, port):
            raise ConfigError(f"port {wanted_port}: Serve already runs on this cluster, at {port}; leave out --port")
        return f"{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    _check_port(*listen)
    serve.start(proxy_location="HeadOnly", http_options={"host": listen[0], "port": listen[1]})
    return f"{listen[0]}:{listen[1]}"


def _cpus(mesh: MeshConfig) -> float:
    hosts = sum((pool.most_hosts + pool.standby) * pool.cpus for pool in mesh.pools)
    return hosts + mesh.router.replicas * mesh.router.cpus + mesh.gateway.replicas * mesh.gateway.cpus


def _wait_ready(app_name: str, report: Callable[[Progress], None]) -> None:
    """Follow the controller and Serve until the application runs. Raises ConfigError with what went wrong."""
    pause = threading.Event()
    while True:
        status = _controller_status(app_name)
        if status is not None and status["error"]:
            raise ConfigError(status["error"])
        application = serve.status().applications.get(app_name)
        if application is not None and application.status == ApplicationStatus.RUNNING:
            return
        if application is not None and application.status not in _BUSY:
            raise ConfigError(_why_not(application))
        if status is not None and not status["ready"]:
            report(Progress(phase=status["phase"], done=status["done"], total=status["total"]))
        elif status is not None:
            report(Progress(phase="loading the dense model"))
        pause.wait(_POLL_S)


def _wait_answering(url: str) -> None:
    """Serve says that the application runs a moment before its proxy listens or knows the way."""
    pause = threading.Event()
    for _ in range(_HEALTH_TRIES):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5.0).status_code == httpx.codes.OK:
                return
        pause.wait(_POLL_S)
    raise ConfigError(f"the mesh runs, but {url}/health does not answer; does a proxy or firewall stand before it?")


def _controller_status(app_name: str) -> dict[str, Any] | None:
    """What the application's controller says, or None while there is none."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if CONTROLLER in actor["name"] and app_name in actor["name"]:
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                handle = ray.get_actor(actor["name"], namespace=actor["namespace"])
                status: dict[str, Any] = ray.get(handle.status.remote(), timeout=10)
                return status
    return None


def _why_not(application: Any) -> str:
    """The last line of what Serve knows: the deployments' messages carry remote traces."""
    messages = [deployment.message for deployment in application.deployments.values()] + [application.message]
    text = next((message for message in messages if message), str(application.status))
    return text.strip().splitlines()[-1].strip()
