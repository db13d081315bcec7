"""The mesh that a run breaks: one that runs, or one that is started for it and stopped after it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from expertmesh.chaos.look import Look, Wanted
from expertmesh.client import fetch
from expertmesh.config import parse_config
from expertmesh.deploy import deployed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from expertmesh.chaos.script import Script
    from expertmesh.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """What a run breaks."""

    url: str
    model: str
    wanted: Wanted
    standby: int | None = None
    """Hosts that are kept started and belong to nobody yet; None: nobody can tell."""
    ready_routers: Callable[[], int] | None = None


@contextlib.contextmanager
def started(script: Script, port: int, report: Callable[[Progress], None]) -> Iterator[Mesh]:
    """The one that runs, or a new one."""
    if script.url is not None:
        served = fetch(script.url, "/v1/models")["data"][0]["id"]
        look = Look(began_s=0.0, hosts=fetch(script.url, "/mesh/hosts"), placement=fetch(script.url, "/mesh/placement"))
        # What it was told to keep, nobody can tell from here; what it has, it is to have again.
        copies = min(map(len, look.holders.values()), default=1)
        yield Mesh(url=script.url, model=served, wanted=Wanted(replicas=max(1, copies), fewest_hosts=len(look.ready)))
        return
    from ray import serve

    from expertmesh.config_file import ServeFile, load_config

    if isinstance(script.mesh, str):
        file = load_config(Path(script.mesh))
        file = replace(file, mesh=file.mesh.model_copy(update={"faults": True}))
    else:
        config = parse_config({**(script.mesh or {}), "faults": True}, f"{script.name}: mesh")
        file = ServeFile(serve={}, app_name="expertmesh", route_prefix="/", mesh=config)
    config = file.mesh

    def ready_routers() -> int:
        application = serve.status().applications.get(file.app_name)
        router = application.deployments.get("router") if application else None
        return int(router.replica_states.get("RUNNING", 0)) if router else 0

    with deployed(file, port=port, report=report) as url:
        yield Mesh(
            url=url,
            model=config.name,
            wanted=Wanted(
                replicas=config.experts.min_replicas,
                fewest_hosts=sum(pool.fewest_hosts for pool in config.pools),
                most_hosts=sum(pool.most_hosts for pool in config.pools),
                routers=config.router.replicas,
            ),
            standby=sum(pool.standby for pool in config.pools),
            ready_routers=ready_routers,
        )
