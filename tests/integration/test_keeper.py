"""The control plane over real host processes: hosts come, go and die, and no answer changes."""

from __future__ import annotations

import pytest

from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.checkpoint.recipe import CheckpointIndex
from expertmesh.checkpoint.source import resolve
from tests.integration.kept import HOT, make_controller, running

COLD = 15


@pytest.fixture(scope="module")
def index() -> CheckpointIndex:
    return index_checkpoint(resolve("tiny"), "float32")


def test_a_hot_expert_gains_a_replica_and_loses_it_when_it_has_gone_cold(index: CheckpointIndex) -> None:
    with running(index) as mesh:
        took_s = mesh.wait(lambda: len(mesh.replicas(HOT)) == 2, "a second replica of the hot expert")
        assert took_s < 10
        mesh.hot = COLD
        mesh.wait(lambda: len(mesh.replicas(COLD)) == 2, "a second replica of the newly hot expert")
        mesh.wait(lambda: len(mesh.replicas(HOT)) == 1, "the old one's retirement")


def test_the_death_of_a_host_loses_nothing_and_it_is_replaced(index: CheckpointIndex) -> None:
    with running(index, experts={"min_replicas": 2}) as mesh:
        mesh.wait(lambda: mesh.calls > 50, "load")
        victim, survivor = sorted(mesh.hosts())
        mesh.cluster.kill(victim)
        mesh.wait(lambda: victim not in mesh.hosts() and len(mesh.hosts()) == 2, "a new host")
        mesh.wait(lambda: all(len(mesh.replicas(e)) == 2 for e in range(16)), "two replicas of each expert again")
        assert survivor in mesh.hosts()


def test_the_death_of_the_only_copies_is_waited_out(index: CheckpointIndex) -> None:
    with running(index, pool={"hosts": 1}) as mesh:
        mesh.wait(lambda: mesh.calls > 50, "load")
        (victim,) = mesh.hosts()
        mesh.cluster.kill(victim)
        before = mesh.calls
        mesh.wait(lambda: mesh.calls > before + 50, "answers from a new host")


def test_hosts_are_added_and_drained_as_asked(index: CheckpointIndex) -> None:
    with running(index, pool={"hosts": 2, "min": 2, "max": 4}) as mesh:
        mesh.ask(mesh.controller.order("scale", {"pool": "cpu", "hosts": 3}))
        mesh.wait(lambda: list(mesh.hosts().values()) == ["ready"] * 3, "a third host")
        mesh.wait(lambda: all(host["replicas"] for host in mesh.report("hosts")), "work for it")
        mesh.ask(mesh.controller.order("scale", {"pool": "cpu", "hosts": 2}))
        mesh.wait(lambda: len(mesh.hosts()) == 2, "its end")
        assert "ended" not in [entry["what"] for entry in mesh.report("decisions")]


def test_a_host_that_stands_by_takes_part_in_a_moment(index: CheckpointIndex) -> None:
    with running(index, pool={"hosts": 1, "max": 2, "standby": 1}) as mesh:
        mesh.wait(lambda: mesh.cluster.num_hosts == 2, "a host that stands by")
        assert list(mesh.hosts()) == ["cpu-0"]
        mesh.wait(lambda: mesh.controller._keeper._members.standby.hosts, "its preparation")
        mesh.ask(mesh.controller.order("scale", {"pool": "cpu", "hosts": 2}))
        took_s = mesh.wait(
            lambda: all(host["rows"] for host in mesh.report("hosts")) and len(mesh.hosts()) == 2, "rows"
        )
        assert took_s < 4
        mesh.wait(lambda: mesh.cluster.num_hosts == 3, "another to stand by")


def test_a_new_controller_goes_on_where_the_last_one_stopped(index: CheckpointIndex) -> None:
    with running(index) as mesh:
        mesh.wait(lambda: mesh.calls > 50, "load")
        hosts, epoch = mesh.hosts(), mesh.exchange.placement.epoch
        mesh.control.run(mesh.controller.leave())
        mesh.controller = make_controller(index, mesh.cluster)
        mesh.control.run(mesh.controller.start())
        assert mesh.hosts().keys() == hosts.keys()
        assert mesh.report("placement")["epoch"] == epoch
        before = mesh.calls
        mesh.wait(lambda: mesh.calls > before + 50, "answers all the while")


def test_what_was_asked_for_and_who_stands_by_is_known_to_the_next_controller(index: CheckpointIndex) -> None:
    pool = {"hosts": 1, "max": 2, "standby": 1}
    with running(index, pool=dict(pool)) as mesh:
        mesh.ask(mesh.controller.order("scale", {"pool": "cpu", "hosts": 2}))
        mesh.wait(lambda: list(mesh.hosts().values()) == ["ready"] * 2, "a second host")
        mesh.wait(lambda: mesh.cluster.num_hosts == 3, "one to stand by")
        mesh.wait(lambda: len(mesh.controller._keeper._members.standby.hosts) == 1, "its preparation")
        mesh.wait(lambda: b'"standby": ["cpu-' in mesh.cluster._note, "a note of it")
        hosts = mesh.hosts()
        mesh.control.run(mesh.controller.leave())
        mesh.controller = make_controller(index, mesh.cluster, pool=dict(pool))
        mesh.control.run(mesh.controller.start())
        assert mesh.hosts().keys() == hosts.keys()
        assert mesh.controller._keeper._members.standby.hosts == mesh.cluster.lent - hosts.keys()
        sizes = mesh.controller._keeper._growth.scaler.sizes()
        assert (sizes["cpu"].hosts, sizes["cpu"].is_manual) == (2, True)


def test_unlike_hosts_get_rows_by_their_measured_rates(index: CheckpointIndex) -> None:
    """One host is three times slower. The rows of each follow its rate, and the layer's time is near the ideal."""
    pools = ({"name": "fast", "hosts": 1}, {"name": "slow", "hosts": 1})
    with running(index, pools=pools, row_us={"fast": 40, "slow": 120}) as mesh:
        mesh.tokens, mesh.hot = 512, None
        mesh.wait(lambda: mesh.calls > 100, "load")
        mesh.wait(lambda: mesh.imbalance() < 1.05, "a placement that suits the rates")
        before = {host["id"]: host for host in mesh.report("hosts")}
        begun = mesh.calls
        mesh.wait(lambda: mesh.calls > begun + 200, "a measurement")
        hosts = mesh.report("hosts")
        rows = {host["id"]: host["rows"] - before[host["id"]]["rows"] for host in hosts}
        rates = {host["id"]: (host["rate"] + before[host["id"]]["rate"]) / 2 for host in hosts}
        for host, of in rows.items():
            share = of / sum(rows.values())
            assert share == pytest.approx(rates[host] / sum(rates.values()), rel=0.1), (rows, rates)
        assert rates["fast-0"] / rates["slow-0"] == pytest.approx(3, rel=0.1)
        slowest_s = max(of / rates[host] for host, of in rows.items())
        assert slowest_s <= 1.1 * sum(rows.values()) / sum(rates.values())
