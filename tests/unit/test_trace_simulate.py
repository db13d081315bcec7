"""The simulator: windows, time models and copies against arithmetic; the strategies against each other."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.errors import ConfigError, TraceError
from expertmesh.ids import HostId
from expertmesh.placement import TimeModel
from expertmesh.trace.fleet import ModelHost, ideal_s, inventory_hosts, model_fleet
from expertmesh.trace.format import Record, TraceHeader
from expertmesh.trace.simulate import SimulationOptions, simulate
from expertmesh.trace.synthetic import SyntheticOptions, generate
from expertmesh.trace.windows import windows

LAUNCH_S, ROW_S = 0.001, 0.0001
MODEL = TimeModel(LAUNCH_S, ROW_S)


def header(*num_experts: int, top_k: int = 1) -> TraceHeader:
    return TraceHeader(model="m", num_experts=num_experts, top_k=top_k, content="rows")


def record(time_s: float, layer: int, *rows: int) -> Record:
    return Record(time_s=time_s, layer=layer, rows_E=np.array(rows), index_TK=None)


def hosts(count: int, slots: int, model: TimeModel = MODEL) -> list[ModelHost]:
    return [ModelHost(host=HostId(f"h{i}"), slots=slots, time_model=model) for i in range(count)]


def options(**changes: object) -> SimulationOptions:
    return SimulationOptions(**({"window_s": 10.0, "plan_every_s": 10.0, "batch_tokens": 600} | changes))


def shifting(seed: int = 0) -> tuple[TraceHeader, list[Record]]:
    """Ten minutes of 4 layers of 16 experts whose ranks drift."""
    made = SyntheticOptions(kind="drift", layers=4, experts=16, top_k=2, windows=60, window_s=10, pace_s=600, seed=seed)
    records = [
        record(10.0 * window, layer, *rows_E)
        for window, rows_LE in enumerate(generate(made))
        for layer, rows_E in enumerate(rows_LE)
    ]
    return header(16, 16, 16, 16, top_k=2), records


def test_records_are_summed_over_windows_and_empty_windows_count() -> None:
    records = [record(0, 0, 1, 2), record(9.9, 0, 10, 0), record(10, 1, 3), record(35, 0, 5, 5)]
    summed = [(w.start_s, [rows.tolist() for rows in w.rows]) for w in windows(records, (2, 1), 10.0)]
    assert summed == [(0, [[11, 2], [0]]), (10, [[0, 0], [3]]), (20, [[0, 0], [0]]), (30, [[5, 5], [0]])]


def test_a_record_that_comes_late_counts_in_the_window_that_is_open() -> None:
    records = [record(12, 0, 1), record(9, 0, 1), record(21, 0, 1)]
    assert [w.rows[0].tolist() for w in windows(records, (1,), 10.0)] == [[0], [2], [1]]


@pytest.mark.parametrize("seed", range(10))
def test_the_ideal_time_is_when_all_water_is_filled_in(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = rng.exponential((0.01, 1e-4), (7, 2)).tolist()
    models = [TimeModel(launch_s, row_s, expert_s=3 * row_s) for launch_s, row_s in pairs]
    time_s = ideal_s(models, 300, 20)
    done = sum(max(0.0, time_s - model.launch_s) / model.row_s for model in models)
    assert done == pytest.approx(300 + 20 * 3)


def test_no_split_over_hosts_good_at_different_things_is_faster_than_the_ideal() -> None:
    reads_fast, counts_fast = TimeModel(0.0, 0.004, 0.001), TimeModel(0.0, 0.001, 0.004)
    rows = (100, 3, 2, 1)
    times = [
        max(
            sum(reads_fast.seconds(n, 1) for n, first in zip(rows, chosen, strict=True) if first),
            sum(counts_fast.seconds(n, 1) for n, first in zip(rows, chosen, strict=True) if not first),
        )
        for chosen in itertools.product((True, False), repeat=4)
    ]
    assert ideal_s([reads_fast, counts_fast], sum(rows), 4) <= min(times)


def test_reading_experts_takes_its_time() -> None:
    model = TimeModel(0.001, 0.0001, expert_s=0.01)
    records = [record(0, 0, 0, 5, 0, 5)]
    result = simulate(header(4), records, hosts(1, 4, model), options(), SYSTEM_CLOCK)
    assert result["strategies"]["static"]["slowest_s_mean"] == pytest.approx(0.001 + 2 * 0.01 + 600 * 0.0001)
    assert result["strategies"]["static"]["imbalance_p50"] == pytest.approx(1.0)


def test_one_hot_expert_with_nowhere_to_go_takes_as_long_as_its_rows() -> None:
    records = [record(10.0 * i, 0, 100, 0, 0, 0) for i in range(6)]
    result = simulate(header(4), records, hosts(2, 2), options(), SYSTEM_CLOCK)
    expected = (LAUNCH_S + 600 * ROW_S) / (LAUNCH_S + 300 * ROW_S)
    for name, of in result["strategies"].items():
        assert of["imbalance_p50"] == of["imbalance_p99"] == pytest.approx(expected)
        assert of["slowest_s_mean"] == pytest.approx(LAUNCH_S + 600 * ROW_S)
        assert result["series"][name]["imbalance"] == pytest.approx([expected] * 6)
        assert (of["moves"], of["replicas_min"], of["replicas_max"]) == (0, 1, 1)


def test_one_hot_expert_is_spread_where_there_is_room() -> None:
    records = [record(10.0 * i, 0, 100, 0, 0, 0) for i in range(6)]
    result = simulate(header(4), records, hosts(2, 4), options(), SYSTEM_CLOCK)
    assert result["series"]["ours"]["imbalance"][-1] == pytest.approx(1.0, abs=0.05)
    assert result["strategies"]["ours"]["replicas_max"] == 2


def test_windows_without_load_are_left_out() -> None:
    records = [record(0, 0, 5, 5), record(95, 0, 5, 5)]
    result = simulate(header(2), records, hosts(2, 2), options(), SYSTEM_CLOCK)
    assert result["series"]["start_s"] == [0.0, 90.0]
    assert result["windows"] == 2
    assert result["simulated_s"] == 100.0


def test_a_layer_without_load_is_not_judged() -> None:
    records = [record(10.0 * i, i % 2, 5, 5) for i in range(4)]
    result = simulate(header(2, 2), records, hosts(2, 3), options(sample_layers=1), SYSTEM_CLOCK)
    assert result["series"]["static"]["imbalance"] == pytest.approx([1.0] * 4, abs=0.2)


def test_planning_again_beats_planning_once_beats_standing_still() -> None:
    made, records = shifting()
    result = simulate(made, records, hosts(4, 24), options(), SYSTEM_CLOCK)
    static, once, ours = (result["strategies"][name] for name in ("static", "once", "ours"))
    assert ours["imbalance_mean"] < once["imbalance_mean"] < static["imbalance_mean"]
    assert (static["plans"], static["moves"], once["plans"]) == (0, 0, 1)
    assert 1 < ours["plans"] <= 60
    assert ours["bytes_moved"] == ours["moves"] * 44_000_000
    assert sum(result["series"]["ours"]["moves"]) <= ours["moves"]


def test_copies_that_take_forever_never_help() -> None:
    made, records = shifting()
    result = simulate(made, records, hosts(4, 24), options(copy_bytes_per_s=1.0), SYSTEM_CLOCK)
    assert result["series"]["ours"]["imbalance"] == result["series"]["static"]["imbalance"]
    assert result["strategies"]["ours"]["plans"] == 1


def test_equal_seeds_give_equal_simulations() -> None:
    made, records = shifting()

    def run(seed: int) -> object:
        result = simulate(made, records, hosts(4, 24), options(seed=seed), SYSTEM_CLOCK)
        return result["strategies"], result["series"]

    assert run(1) == run(1) != run(2)


def test_layers_take_turns_where_not_all_are_judged() -> None:
    even, hot = (25, 25, 25, 25), (100, 0, 0, 0)
    records = [record(10.0 * i, layer, *rows) for i in range(4) for layer, rows in enumerate((even, hot))]
    result = simulate(header(4, 4), records, hosts(2, 4), options(sample_layers=1), SYSTEM_CLOCK)
    static = result["series"]["static"]["imbalance"]
    assert static[0] < 1.2 < static[1]
    assert static[2] < 1.2 < static[3]
    assert "1 of 2 layers" in result["evaluated"]


def test_the_result_is_plain_json() -> None:
    made, records = shifting()
    result = simulate(made, records, hosts(4, 24), options(), SYSTEM_CLOCK)
    assert json.loads(json.dumps(result)) == result


def test_a_trace_without_load_cannot_be_simulated() -> None:
    for records in ([], [record(0, 0, 0, 0)]):
        with pytest.raises(TraceError, match="holds no load"):
            simulate(header(2), records, hosts(2, 2), options(), SYSTEM_CLOCK)


def test_experts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError):
        simulate(header(4), [record(0, 0, 1, 1, 1, 1)], hosts(1, 3), options(), SYSTEM_CLOCK)


@pytest.mark.parametrize(
    "name", ["window_s", "plan_every_s", "half_life_s", "batch_tokens", "copy_bytes_per_s", "sample_layers"]
)
def test_options_must_be_above_zero(name: str) -> None:
    for value in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"{name}: "):
            options(**{name: value})


def test_a_model_fleet_has_room_and_slow_hosts_as_asked() -> None:
    fleet = model_fleet(header(10, 10), 4, None, TimeModel(0.001, 1e-5, 1e-4), 0.5)
    assert [host.slots for host in fleet] == [7] * 4
    assert [host.time_model for host in fleet[1:3]] == [TimeModel(0.001, 1e-5, 1e-4), TimeModel(0.002, 2e-5, 2e-4)]
    assert len({host.host for host in fleet}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, None, MODEL, 0.0), "hosts: 0"),
        ((2, 0, MODEL, 0.0), "slots: 0"),
        ((2, None, TimeModel(-1.0, 1.0), 0.0), "launch_ms"),
        ((2, None, TimeModel(0.0, 0.0), 0.0), "row_us"),
        ((2, None, TimeModel(0.0, 1.0, -1.0), 0.0), "expert_us"),
        ((2, None, MODEL, 1.5), r"slow: 1\.5"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_fleet(header(4), *arguments)


@pytest.fixture
def inventory(tmp_path: Path) -> Iterator[Path]:
    return tmp_path / "inventory.json"


def test_an_inventory_is_read(inventory: Path) -> None:
    inventory.write_text('{"hosts": [{"host": "a", "slots": 3, "rate": 200.0, "node": "n", "rack": "r"}]}')
    assert inventory_hosts(inventory) == [
        ModelHost(host=HostId("a"), slots=3, time_model=TimeModel(0.0, 0.005), node="n", rack="r")
    ]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"hosts": []}', '{"hosts": [{}]}', '{"hosts": [{"host": "a", "slots": -1}]}',
     '{"hosts": [{"host": "a", "slots": 1, "rate": 0}]}', '{"hosts": [{"host": "a", "slots": 1, "rate": "fast"}]}'],
)  # fmt: skip
def test_a_bad_inventory_is_refused_in_one_line(inventory: Path, text: str) -> None:
    inventory.write_text(text)
    with pytest.raises(ConfigError, match=r"inventory: .*inventory\.json") as caught:
        inventory_hosts(inventory)
    assert "\n" not in str(caught.value)
