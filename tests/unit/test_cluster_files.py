"""Cluster files: Ray takes them, and they have the machines that our configs ask for. No cloud is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator

from expertmesh.config import MeshConfig
from expertmesh.config_file import load_config

ROOT = Path(__file__).parents[2]
CLUSTERS = sorted((ROOT / "cluster").glob("*.yaml"))
ON_GPUS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "device: cuda" in path.read_text()]


def prepared(path: Path) -> dict:
    """A cluster file as `ray up` sees it, with Ray's defaults."""
    return prepare_config(yaml.safe_load(path.read_text()))


def demands(mesh: MeshConfig) -> list[tuple[dict[str, float], dict[str, str]]]:
    """What Ray must find places for, each with resources and label selector: hosts, routers, gateways."""
    hosts = [
        ({"CPU": pool.cpus, "GPU": pool.gpus} | _accelerator(pool.accelerator), pool.labels)
        for pool in mesh.pools
        for _ in range(pool.hosts)
    ]
    routers = [({"CPU": mesh.router.cpus, "GPU": mesh.router.gpus}, {})] * mesh.router.replicas
    return hosts + routers + [({"CPU": mesh.gateway.cpus}, {})] * mesh.gateway.replicas


def _accelerator(name: str | None) -> dict[str, float]:
    return {f"accelerator_type:{name}": 0.001} if name else {}  # what Ray makes of `accelerator_type`


def machines_for(cluster: dict, wanted: list[tuple[dict[str, float], dict[str, str]]]) -> tuple[dict[str, int], int]:
    """Which machines Ray's autoscaler starts for demands, by kind, and how many demands it can never place."""
    settings = AutoscalingConfig(cluster, skip_content_hash=True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=settings.get_node_type_configs(),
        max_num_nodes=settings.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count(
            [
                ResourceRequestUtil.make(
                    {name: amount for name, amount in resources.items() if amount},
                    label_selectors=[
                        [(key, LabelSelectorOperator.LABEL_OPERATOR_IN, [value]) for key, value in labels.items()]
                    ],
                )
                for resources, labels in wanted
            ]
        ),
    )
    reply = ResourceDemandScheduler(event_logger=None).schedule(request)
    return {launch.instance_type: launch.count for launch in reply.to_launch}, len(reply.infeasible_resource_requests)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_ray_takes_the_file(path: Path) -> None:
    validate_config(prepared(path))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_every_node_gets_the_token_and_asks_for_it(path: Path) -> None:
    cluster = prepared(path)
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for kind in ("head", "worker"):
        assert any("RAY_AUTH_MODE=token" in command for command in cluster[f"{kind}_setup_commands"])


def test_both_files_install_alike() -> None:
    common = [yaml.safe_load(path.read_text()) for path in CLUSTERS]
    for key in ("file_mounts", "rsync_exclude", "rsync_filter", "setup_commands"):
        assert common[0][key] == common[1][key]


def test_what_is_not_copied_to_the_machines_is_what_git_ignores() -> None:
    assert ".venv/" in (ROOT / ".gitignore").read_text().splitlines()


def test_on_premises_every_listed_machine_takes_part_at_all_times() -> None:
    cluster = prepared(ROOT / "cluster/onprem.yaml")
    machines = len(cluster["provider"]["worker_ips"])
    (kind,) = cluster["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == cluster["max_workers"] == machines


@pytest.mark.parametrize("path", ON_GPUS, ids=lambda path: path.stem)
def test_the_cloud_has_the_machines_that_a_config_asks_for(path: Path) -> None:
    mesh = load_config(path).mesh
    started, unplaced = machines_for(yaml.safe_load((ROOT / "cluster/gpu.yaml").read_text()), demands(mesh))
    assert unplaced == 0
    for pool in mesh.pools:
        if pool.accelerator:
            assert started[pool.accelerator.lower()] >= pool.hosts * pool.gpus


@pytest.mark.parametrize(
    "demand",
    [({"CPU": 1, "GPU": 1, "accelerator_type:B200": 0.001}, {}), ({"CPU": 1}, {"rack": "a"}), ({"CPU": 64}, {})],
)
def test_what_no_machine_offers_would_be_noticed(demand: tuple[dict[str, float], dict[str, str]]) -> None:
    assert machines_for(yaml.safe_load((ROOT / "cluster/gpu.yaml").read_text()), [demand]) == ({}, 1)
