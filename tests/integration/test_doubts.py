"""Replicas that are wrong, or are said to be: none is used, and none that is right is lost."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.checkpoint.recipe import CheckpointIndex
from expertmesh.checkpoint.source import resolve
from expertmesh.doubt import Doubt
from expertmesh.ids import ExpertId, HostId
from tests.integration.kept import Mesh, running

EXPERTS = 16


@pytest.fixture(scope="module")
def index() -> CheckpointIndex:
    return index_checkpoint(resolve("tiny"), "float32")


def suspect(mesh: Mesh, *doubted: tuple[int, str]) -> None:
    """A router doubts these experts of layer 0."""
    doubts = [
        Doubt(expert=ExpertId(0, expert), host=HostId(host), cause="its rows are not finite")
        for expert, host in doubted
    ]
    mesh.ask(mesh.controller.suspect("router", doubts))


def test_a_replica_doubted_for_nothing_is_used_again_once_it_was_tested(index: CheckpointIndex) -> None:
    with running(index, experts={"min_replicas": 2, "elastic": False}) as mesh:
        mesh.wait(lambda: mesh.calls > 20, "load")
        epoch = mesh.report("placement")["epoch"]
        suspect(mesh, (3, "cpu-0"))
        mesh.wait_decision("quarantine", "0:3 on cpu-0: its rows are not finite, says router")
        mesh.wait_decision("readmit", "0:3 on cpu-0")
        mesh.wait(lambda: set(mesh.replicas(3)) == {"cpu-0", "cpu-1"}, "its return")
        assert mesh.report("placement")["epoch"] >= epoch + 2, "it was not named in between"
        suspect(mesh, (3, "cpu-7"), (99, "cpu-0"))
        assert sum(entry["what"] == "quarantine" for entry in mesh.report("decisions")) == 1


def test_a_host_that_computes_otherwise_than_before_loses_what_is_doubted_and_others_get_it(
    index: CheckpointIndex,
) -> None:
    with running(index, pool={"hosts": 3}, experts={"min_replicas": 2, "elastic": False}, faults=True) as mesh:
        mesh.wait(lambda: mesh.calls > 20, "load")
        bad = mesh.replicas(5)[0]
        held = [expert for expert in range(EXPERTS) if bad in mesh.replicas(expert)]
        with mesh.calling:
            mesh.ask(mesh.controller.order("fault", {"target": bad, "faults": [{"kind": "corrupt"}], "seed": 1}))
            suspect(mesh, *((expert, bad) for expert in held))
            mesh.wait_decision("condemn", f"0:5 on {bad}: {bad} computes otherwise than when it was loaded")
            mesh.wait(lambda: all(len(set(mesh.replicas(e)) - {bad}) == 2 for e in held), "replicas on other hosts")
            assert not any(bad in mesh.replicas(expert) for expert in held)
            mesh.ask(mesh.controller.order("fault", {"target": bad, "faults": [], "seed": 1}))


def test_a_host_that_is_doubted_again_and_again_is_drained_and_replaced(index: CheckpointIndex) -> None:
    with running(index, experts={"min_replicas": 2, "elastic": False}) as mesh:
        mesh.wait(lambda: mesh.calls > 20, "load")
        for expert in range(3):
            suspect(mesh, (expert, "cpu-0"))
            mesh.wait_decision("readmit", f"0:{expert} on cpu-0")
            threading.Event().wait(1.1)  # doubts that come together are one
        mesh.wait_decision("distrust", "cpu-0: doubted 3 times")
        mesh.wait(lambda: sorted(mesh.hosts()) == ["cpu-1", "cpu-2"], "another host in its place")
        mesh.wait(lambda: all(len(mesh.replicas(e)) == 2 for e in range(EXPERTS)), "two replicas of each expert")


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """For each of three pools a folder with its own copy of the checkpoint, `model`."""
    for pool in "abc":
        (tmp_path / pool / "model").mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(resolve("tiny") / name, tmp_path / pool / "model" / name)
    return {pool: tmp_path / pool for pool in "abc"}


def damage(folder: Path, layer: int, number: float) -> None:
    """Write a number into every expert of a layer, by replacing the file."""
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.startswith(f"model.layers.{layer}.mlp.experts."):
            tensors[name] = tensors[name].clone()
            tensors[name].view(-1)[7] = number
    save_file(tensors, file.with_suffix(".new"), metadata={"format": "pt"})
    file.with_suffix(".new").replace(file)


def of_layer(mesh: Mesh, layer: int) -> list[set[str]]:
    """The hosts of each of its experts."""
    placed = mesh.report("placement")["hosts"]
    return [{host["id"] for host in placed if [layer, expert] in host["experts"]} for expert in range(EXPERTS)]


THREE = tuple({"name": name, "hosts": 1} for name in "abc")


def test_what_one_host_reads_otherwise_than_the_others_is_not_kept_there(
    index: CheckpointIndex, folders: dict[str, Path]
) -> None:
    damage(folders["b"], layer=3, number=0.5)
    experts = {"min_replicas": 2, "elastic": False}
    with running(index, model="model", pools=THREE, folders=folders, experts=experts) as mesh:
        mesh.wait(lambda: all(hosts == {"a-0", "c-0"} for hosts in of_layer(mesh, 3)), "replicas that agree")
        condemned = mesh.wait_decision("condemn", "b-0 read other weights than")
        assert condemned["why"].startswith("3:")


def test_what_one_host_cannot_read_is_loaded_by_another(index: CheckpointIndex, folders: dict[str, Path]) -> None:
    experts = {"min_replicas": 2, "elastic": False}
    with running(index, model="model", pools=THREE, folders=folders, experts=experts) as mesh:
        mesh.wait(lambda: mesh.calls > 20, "load")
        damage(folders["b"], layer=3, number=float("nan"))
        before = of_layer(mesh, 3)
        mesh.cluster.kill(HostId("a-0"))
        failed = mesh.wait_decision("failed", f"of {folders['b']}/model/model.safetensors")
        assert "holds a NaN or an infinity" in failed["why"]
        mesh.wait(lambda: all(len(hosts) == 2 for hosts in of_layer(mesh, 3)), "two replicas of each again")
        assert {expert for expert, hosts in enumerate(of_layer(mesh, 3)) if "b-0" in hosts} == {
            expert for expert, hosts in enumerate(before) if "b-0" in hosts
        }, "those that it had read before the damage"
