"""A start that cannot work: one clear line, exit code 2, nothing left running."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from expertmesh.bench.measure import free_port
from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.config import MeshConfig, PoolSection
from expertmesh.control.controller import Controller
from expertmesh.testing.processes import ProcessCluster
from expertmesh.transport.grpc_control import GrpcHostControl
from tests.integration.served import command_line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint of 2 layers with 4 experts each."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path, max_shard_size="30KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


def refused(*arguments: str, environment: dict[str, str] | None = None) -> str:
    """What `expertmesh serve` says when it refuses: one line, on standard error, with exit code 2."""
    port = () if "--port" in arguments else ("--port", str(free_port()))
    command = command_line("serve", *arguments, *port)
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, env=environment)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("expertmesh: ")]
    assert len(lines) == 1, done.stderr
    return lines[0].removeprefix("expertmesh: ")


def test_an_unknown_model() -> None:
    message = refused("no/such-model-anywhere")
    assert "no/such-model-anywhere" in message
    assert "tiny" in message


def test_an_unknown_config_key(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("applications: [{import_path: 'expertmesh.app:build', args: {modle: tiny}}]")
    assert refused(str(config)) == f"{config}: applications.args: unknown key 'modle'; did you mean 'model'?"


def test_a_checkpoint_without_one_of_its_shards(damaged: Path) -> None:
    shard = sorted(damaged.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(str(damaged))


def test_a_truncated_checkpoint(damaged: Path) -> None:
    shard = sorted(damaged.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    message = refused(str(damaged))
    assert shard.name in message
    assert "truncated" in message


def test_a_port_in_use(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused(str(checkpoint), "--port", str(port))
    assert message == f"port {port} on 127.0.0.1: Address already in use; choose another with --port"


OLD_RAY = """
import json, sys, ray
from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
import ray._common.usage.usage_constants as usage
context = ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
gcs = ray._private.worker.global_worker.gcs_client
key = usage.CLUSTER_METADATA_KEY
known = json.loads(gcs.internal_kv_get(key, namespace=KV_NAMESPACE_CLUSTER))
gcs.internal_kv_put(key, json.dumps(known | {"ray_version": "2.9.0"}).encode(), True, namespace=KV_NAMESPACE_CLUSTER)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.mark.ray
def test_a_ray_cluster_of_another_version(checkpoint: Path) -> None:
    """A real cluster that says it is Ray 2.9."""
    import os

    script = [sys.executable, "-c", OLD_RAY]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as old:
        try:
            assert old.stdout is not None
            address = old.stdout.readline().strip()
            assert address, "the old cluster did not start"
            message = refused(str(checkpoint), environment=os.environ | {"RAY_ADDRESS": address})
        finally:
            old.communicate("")
    assert message.startswith(f"cannot join the Ray cluster at {address}: Version mismatch: ")
    assert "2.9.0" in message


@pytest.mark.ray
@pytest.mark.slow
def test_pools_that_are_too_small_end_the_command(checkpoint: Path, tmp_path: Path) -> None:
    """Through Ray, Serve and the controller, to the person's terminal."""
    args = {"model": str(checkpoint), "pools": [{"hosts": 2, "memory": "20KiB"}]}
    config = tmp_path / "small.yaml"
    config.write_text(json.dumps({"applications": [{"import_path": "expertmesh.app:build", "args": args}]}))
    message = refused(str(config))
    assert message.startswith("the pools are too small: 8 slots are needed (8 experts of 6,144 bytes, 1 replicas of")
    assert "bytes of memory are missing" in message


def start_error(path: Path, *, memory: str = "1GiB", min_replicas: int = 1) -> str | None:
    """What the controller's start fails on, over two real host processes."""

    async def start(cluster: ProcessCluster) -> str | None:
        config = MeshConfig(model=str(path), pools=(PoolSection(hosts=2),), experts={"min_replicas": min_replicas})
        controller = Controller(
            config,
            cluster,
            lambda host: GrpcHostControl(host, cluster.token),
            lambda: index_checkpoint(path),
            SYSTEM_CLOCK,
        )
        await controller.start()
        await controller.stop()
        return controller.start_up.error

    with ProcessCluster(2, memory) as cluster:
        return asyncio.run(start(cluster))


def test_an_expert_that_is_not_a_number(damaged: Path) -> None:
    for shard in damaged.glob("*.safetensors"):
        tensors = load_file(shard)
        key = next((key for key in tensors if "experts.2.up_proj" in key), None)
        if key is not None:
            tensors[key][0, 0] = float("nan")
            save_file(tensors, shard, metadata={"format": "pt"})
            break
    error = start_error(damaged)
    assert error is not None
    assert key in error
    assert shard.name in error


def test_an_architecture_that_is_not_supported(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    error = start_error(tmp_path)
    assert error is not None
    assert "llama" in error.lower()


def test_slots_for_one_copy_but_not_for_two(checkpoint: Path) -> None:
    """What 8 experts on 2 hosts take once fits; a second copy of each does not."""
    assert start_error(checkpoint, memory="40KiB") is None
    error = start_error(checkpoint, memory="40KiB", min_replicas=2)
    assert error is not None
    assert error.startswith("the pools are too small: 16 slots are needed")


def test_the_controller_places_replicas_on_distinct_hosts(checkpoint: Path) -> None:
    assert start_error(checkpoint, min_replicas=2) is None
