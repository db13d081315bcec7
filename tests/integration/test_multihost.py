"""Several machines, as an operator meets them: `ray up` with the file we ship, a mesh across them, machines that come
and go. They are namespaces of this one; the tests go in order, each from where the one before left the cluster."""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import expertmesh
from expertmesh.models import PROMPTS, tiny_path
from tests.integration import netns
from tests.integration.netns import CHECKOUT, Machine, Network

pytestmark = [
    pytest.mark.ray,
    pytest.mark.long,
    pytest.mark.skipif(netns.missing() is not None, reason=str(netns.missing())),
]

logger = logging.getLogger(__name__)

TOKEN = secrets.token_urlsafe()  # the mesh's
CUTS = int(os.environ.get("EXPERTMESH_TEST_CUTS", "1"))
"""How often a machine is cut off the network."""

# Every machine has expertmesh already, so that `ray up` need not download it, and one core, as far as Ray knows.
INSTALLED = {"expertmesh/.venv": Path(sys.prefix), ".bashrc": "export RAY_OVERRIDE_RESOURCES='{\"CPU\": 1}'\n"}

# Ends when the machines with these addresses, and no others, are alive for Ray. One process, for to start Ray's command
# line again and again would take the cores that the machines share.
WAIT_ALIVE = """
import sys, threading, time
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
gcs, wanted, deadline = GcsClient(address=sys.argv[1]), set(sys.argv[2:]), time.monotonic() + 60
while True:
    nodes = gcs.get_all_node_info().values()
    alive = {node.node_manager_address for node in nodes if node.state == GcsNodeInfo.ALIVE}
    if alive == wanted:
        break
    if time.monotonic() > deadline:
        sys.exit(f"{alive} take part, not {wanted}")
    threading.Event().wait(0.2)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The machines, and the laptop that they are run from."""

    network: Network
    laptop: Machine
    head: Machine
    one: Machine
    two: Machine
    three: Machine
    """Not of the cluster at first."""

    @property
    def url(self) -> str:
        return f"http://{self.head.address}:8000"

    def up(self, workers: list[Machine], options: str = "") -> None:
        """`ray up` with the shipped file, changed where it says CHANGE."""
        file = yaml.safe_load((CHECKOUT / "cluster/onprem.yaml").read_text())
        file["provider"] |= {"head_ip": self.head.address, "worker_ips": [worker.address for worker in workers]}
        file["auth"]["ssh_user"] = "root"
        self.laptop.run("cat > ~/onprem.yaml", given=yaml.safe_dump(file))
        self.laptop.run(f"ray up --yes {options} ~/onprem.yaml", timeout_s=120)

    def on_head(self, command: str) -> str:
        """What a command says on the head."""
        return self.laptop.run(f"ray exec ~/onprem.yaml '{command}' 2> /dev/null")

    def wait_alive(self, *machines: Machine) -> None:
        """Until these machines, and no others, take part."""
        addresses = " ".join(machine.address for machine in machines)
        command = f"RAY_AUTH_MODE=token python - {self.head.address}:6379 {addresses}"
        self.laptop.run(command, given=WAIT_ALIVE, timeout_s=90)

    def wait_healthy(self) -> None:
        """Until the mesh answers."""
        self.wait(lambda: _answers(f"{self.url}/health"), "an answer")

    def wait(self, until: Callable[[], bool], what: str, timeout_s: float = 90) -> None:
        """Until something holds; what Serve says if it never does."""
        deadline = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < deadline, f"{what} never came: {self.on_head('serve status')}"
            threading.Event().wait(0.5)

    def state(self) -> str:
        """What the mesh and the machines' logs say, for who has to find out why a test failed."""
        logs = "cd /tmp/ray/session_latest/logs; ps -eo pid,args | grep ray:: | cut -c1-120; tail -v -n 25 serve/*.log"
        said = [f"{self.url}/mesh/{what}: {_said(f'{self.url}/mesh/{what}')}" for what in ("hosts", "routers", "moves")]
        decisions = _said(f"{self.url}/mesh/decisions")[-4000:]
        machines = (self.head, self.one, self.two, self.three)
        return "\n".join([*said, decisions, *(f"=== {at.name}\n{at.run(f'{logs} || true')}" for at in machines)])

    def order(self, what: str, **values: object) -> None:
        """Ask the mesh for a change, as an operator."""
        headers = {"authorization": f"Bearer {TOKEN}"}
        httpx.post(f"{self.url}/mesh/{what}", json=values, headers=headers, timeout=30).raise_for_status()


def _said(url: str) -> str:
    try:
        return httpx.get(url, timeout=5).text
    except httpx.TransportError as error:
        return repr(error)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with netns.network(tmp_path_factory.mktemp("network")) as network:
        made = _machines(network)
        made.laptop.run("ray get-auth-token --generate")
        made.up([made.one, made.two])
        yield made


def _machines(network: Network) -> Cluster:
    profile = f"export PATH={sys.prefix}/bin:$PATH RAY_USAGE_STATS_ENABLED=0\n"
    laptop = network.add("laptop", {".ssh/id_ed25519": network.key.read_text(), ".profile": profile})
    head, one, two, three = (network.add(name, INSTALLED) for name in ("head", "one", "two", "three"))
    return Cluster(network=network, laptop=laptop, head=head, one=one, two=two, three=three)


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """What the same checkpoint writes after each prompt in one process, experts and all."""
    whole = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    written = {}
    for prompt in PROMPTS.values():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = whole.generate(ids, max_new_tokens=24, do_sample=False)
        written[prompt] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return written


def answers(cluster: Cluster) -> dict[str, str]:
    """What the mesh writes after each prompt, asked from outside."""
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60)
    try:
        return {
            prompt: client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0).choices[0].text
            for prompt in PROMPTS.values()
        }
    except openai.OpenAIError as error:
        error.add_note(cluster.state())
        raise


def host_machines(cluster: Cluster) -> set[str]:
    """Addresses of the machines that hosts run on."""
    hosts = httpx.get(f"{cluster.url}/mesh/hosts", timeout=30).json()
    return {host["address"].rpartition(":")[0] for host in hosts}


def test_every_listed_machine_joins(cluster: Cluster) -> None:
    cluster.wait_alive(cluster.head, cluster.one, cluster.two)


def test_only_those_who_have_the_token_are_let_in(cluster: Cluster) -> None:
    ask = f"RAY_AUTH_MODE=token ray status --address {cluster.head.address}:6379"
    assert "Node status" in cluster.laptop.run(ask)
    assert "Unauthenticated" in cluster.laptop.run(f"! RAY_AUTH_TOKEN={'0' * 64} {ask}")


def test_a_mesh_across_machines_answers_as_one_process_does(cluster: Cluster, expected: dict[str, str]) -> None:
    config = yaml.safe_load((CHECKOUT / "configs/tiny.yaml").read_text())
    config["http_options"]["host"] = "0.0.0.0"
    (application,) = config["applications"]
    application["runtime_env"] = {"env_vars": {"EXPERTMESH_TOKEN": TOKEN}}
    application["args"]["network"] = {"listen": "node"}
    application["args"]["experts"] = {"min_replicas": 2}
    pool = application["args"]["pools"][0] | {"labels": {"role": "worker"}, "cpus": 0.5}
    # A host of the other pool takes a whole machine, and so waits for one that has none yet.
    later = {"name": "later", "hosts": 0, "max": 1, "labels": {"role": "worker"}, "cpus": 1}
    application["args"]["pools"] = [pool, later]
    cluster.laptop.run("cat > ~/mesh.yaml", given=yaml.safe_dump(config))
    cluster.laptop.run("ray rsync-up ~/onprem.yaml ~/mesh.yaml '~/mesh.yaml'")
    cluster.on_head("serve deploy mesh.yaml")
    cluster.wait_healthy()
    assert host_machines(cluster) == {cluster.one.address, cluster.two.address}
    assert answers(cluster) == expected


def test_a_script_outside_computes_on_the_hosts(cluster: Cluster) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    with expertmesh.attach(model, cluster.url, token=TOKEN):
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)


@pytest.mark.timeout(180 + 60 * CUTS)
def test_a_machine_that_is_cut_off_for_a_while_is_not_missed(cluster: Cluster, expected: dict[str, str]) -> None:
    """Each expert is on two machines, and one of these vanishes from the network for 5 s, CUTS times, one each 30 s:
    all requests are answered, alike, and none takes 2 s longer than usual.

    One that the router or the gateway runs on must stay: there is but one of each here.
    """
    running = "pgrep -f '[S]erveReplica:expertmesh' || true"
    victims = [machine for machine in (cluster.one, cluster.two) if not machine.run(running).strip()]
    if not victims:
        pytest.skip("Ray has put the router on one machine and the gateway on the other")

    def ask_until(done: threading.Event) -> list[float]:
        """How long each answer took."""
        took_s = []
        while not done.is_set():
            began_s = time.monotonic()
            assert answers(cluster) == expected
            took_s.append(time.monotonic() - began_s)
        return took_s

    pause = threading.Event()
    with ThreadPoolExecutor(4) as crowd:
        done = threading.Event()
        asking = [crowd.submit(ask_until, done) for _ in range(4)]
        pause.wait(5)
        for cut in range(CUTS):
            next_s = time.monotonic() + 30
            with cluster.network.cut_off(victims[cut % len(victims)]):
                pause.wait(5)
            cluster.wait(lambda: _all_serve(cluster), "the return of the machine")
            if cut + 1 < CUTS:
                pause.wait(max(0, next_s - time.monotonic()))
        done.set()
        took_s = sorted(itertools.chain.from_iterable(of.result() for of in asking))
    usual_s = took_s[len(took_s) // 2]
    logger.info(
        "%d times cut off: %d rounds of %d requests, none failed, all answers equal; a round took %.2f s in the median "
        "and %.2f s at most",
        *(CUTS, len(took_s), len(expected), usual_s, took_s[-1]),
    )
    assert took_s[-1] < usual_s + 2.0


def _all_serve(cluster: Cluster) -> bool:
    """Whether no host is out of reach, for the controller or for the router."""
    hosts, routers = (httpx.get(f"{cluster.url}/mesh/{what}", timeout=30).json() for what in ("hosts", "routers"))
    is_reached = all(host["state"] == "ready" for host in hosts)
    return is_reached and not any(router["avoided"] for router in routers)


def test_a_machine_that_is_listed_later_joins(cluster: Cluster, expected: dict[str, str]) -> None:
    cluster.up([cluster.one, cluster.two, cluster.three], "--no-restart")
    cluster.wait_alive(cluster.head, cluster.one, cluster.two, cluster.three)
    cluster.order("scale", pool="later", hosts=1)
    machines = {cluster.one.address, cluster.two.address, cluster.three.address}
    cluster.wait(lambda: host_machines(cluster) == machines, "a host on the new machine")
    assert answers(cluster) == expected


def test_a_machine_that_is_unlisted_leaves(cluster: Cluster, expected: dict[str, str]) -> None:
    cluster.up([cluster.one, cluster.two], "--no-restart")
    cluster.laptop.run(f"ssh -o StrictHostKeyChecking=no {cluster.three.address} 'source ~/.bashrc; ray stop'")
    assert answers(cluster) == expected
    cluster.wait_alive(cluster.head, cluster.one, cluster.two)
    cluster.wait(lambda: cluster.three.address not in host_machines(cluster), "the end of its host")
    assert answers(cluster) == expected
