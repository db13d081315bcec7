"""Routers that are killed, drained and replaced while clients stream: nobody notices."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from ray import serve
from ray.serve.schema import ApplicationStatus

from expertmesh.app import application
from expertmesh.bench.crowd import Answer, Crowd, undisturbed, verdict
from expertmesh.bench.measure import free_port
from expertmesh.config import MeshConfig, parse_config
from expertmesh.config_file import ServeFile
from expertmesh.deploy import deployed
from expertmesh.models import PROMPTS

KILLS = int(os.environ.get("EXPERTMESH_TEST_KILLS", "2"))

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(300 + 60 * KILLS)]

CLIENTS, TOKENS = 4, 64
APP = "mortal"  # other tests' meshes may be running
TEXTS = [text[start:] for text in PROMPTS.values() for start in (0, 3)]


def mesh(**router: object) -> MeshConfig:
    values = {"model": "tiny", "dtype": "float32", "pools": [{"hosts": 2, "cpus": 0.1}]}
    return parse_config(values | {"router": {"cpus": 0.1, **router}, "gateway": {"cpus": 0.1}}, "test")


def deployed_mesh(config: MeshConfig):
    file = ServeFile(serve={}, app_name=APP, route_prefix="/", mesh=config)
    return deployed(file, port=free_port(), report=lambda progress: None)


def until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    pause, deadline = threading.Event(), time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        pause.wait(0.1)


def routers() -> list[psutil.Process]:
    """The processes that run a router of this test's mesh."""
    processes = psutil.Process().children(recursive=True)
    return [process for process in processes if f"{APP}:router" in _title(process)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def num_serving() -> int:
    """Routers that Serve sends requests to."""
    return serve.status().applications[APP].deployments["router"].replica_states.get("RUNNING", 0)


def longest_wait_s(answers: list[Answer]) -> float:
    """The longest that any client waited for a token, the first of an answer included."""
    times = [[answer.started_s, *answer.times_s] for answer in answers]
    return max(now - before for ours in times for before, now in itertools.pairwise(ours))


def test_routers_killed_under_their_streams_go_unnoticed(record_property) -> None:
    with deployed_mesh(mesh(replicas=2)) as url:
        until(lambda: num_serving() == 2)
        right = undisturbed(url, TEXTS, TOKENS)
        pause = threading.Event()
        with Crowd(url, TEXTS, clients=CLIENTS, tokens=TOKENS) as crowd:
            for number in range(KILLS):
                pause.wait(1.0)
                assert len(routers()) == 2
                victim = routers()[number % 2]
                os.kill(victim.pid, signal.SIGKILL)
                until(lambda victim=victim: victim not in routers() and len(routers()) == 2 and num_serving() == 2)
            pause.wait(1.0)
        assert verdict(crowd.answers, right)["failed"] == 0, verdict(crowd.answers, right)
        assert verdict(crowd.answers, right)["wrong_answers"] == 0
        record_property("longest_wait_s", longest_wait_s(crowd.answers))
        assert longest_wait_s(crowd.answers) < 10


@pytest.fixture(scope="module")
def one_router() -> Iterator[str]:
    """The URL of a mesh with one router, which drains for less than a stream takes."""
    with deployed_mesh(mesh(drain_s=1)) as url:
        yield url


def test_requests_wait_for_the_replacement_of_the_only_router(one_router: str) -> None:
    right = undisturbed(one_router, TEXTS, TOKENS)
    with Crowd(one_router, TEXTS, clients=2, tokens=TOKENS) as crowd:
        threading.Event().wait(1.0)
        (router,) = routers()
        os.kill(router.pid, signal.SIGKILL)
        until(lambda: [process.pid for process in routers()] not in ([], [router.pid]) and num_serving() == 1)
        threading.Event().wait(1.0)
    outcome = verdict(crowd.answers, right)
    assert (outcome["failed"], outcome["wrong_answers"]) == (0, 0), outcome
    assert longest_wait_s(crowd.answers) > 1, "none was under way when the router was killed"


def test_a_changed_config_is_deployed_under_load_and_no_stream_breaks(one_router: str) -> None:
    right = undisturbed(one_router, TEXTS, TOKENS)
    old = routers()
    with Crowd(one_router, TEXTS, clients=CLIENTS, tokens=TOKENS) as crowd:
        threading.Event().wait(1.0)
        serve.run(
            application(mesh(drain_s=1, max_queue=300), "second"),
            name=APP,
            route_prefix="/",
            _local_testing_mode=False,
        )
        until(lambda: serve.status().applications[APP].status == ApplicationStatus.RUNNING)
        until(lambda: not any(process in routers() for process in old))
        threading.Event().wait(2.0)
    outcome = verdict(crowd.answers, right)
    assert (outcome["failed"], outcome["wrong_answers"]) == (0, 0), outcome
    assert all(answer.gaps_s for answer in crowd.answers)
