"""Fault scripts: ours are sound, and a wrong one is refused in one line that names the key."""

from __future__ import annotations

import pytest
import yaml

from expertmesh.chaos.script import load_script, parse_script, shipped
from expertmesh.config import parse_config
from expertmesh.errors import ConfigError

STEP = {"faults": [{"kind": "kill"}]}
EXPERTS, EXPERT_BYTES = 64, 258_048  # of the tiny model, in float32
SCRIPT = {"name": "mine", "mesh": {"model": "tiny"}, "steps": [STEP]}


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("is_short", [False, True])
def test_our_scripts_and_their_meshes_are_sound(name: str, is_short: bool) -> None:
    script = load_script(name)
    assert (script.name, bool(script.about)) == (name, True)
    if is_short:
        script = script.shortened()
        assert script.load.clients <= 8
    assert isinstance(script.mesh, dict)
    mesh = parse_config(script.mesh, name)
    slots = sum(pool.fewest_hosts * min(EXPERTS, int(pool.memory or 0) // EXPERT_BYTES) for pool in mesh.pools)
    assert slots >= EXPERTS * mesh.experts.min_replicas
    assert parse_script(yaml.safe_load(script.to_yaml()), name) == script


def test_there_is_a_script_for_each_promise() -> None:
    promises = {"kill-hosts", "kill-anyway", "pause-and-slow", "lossy", "kill-router", "kill-controller"}
    assert promises | {"one-of-four", "corrupt", "soak"} == set(shipped())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepps": []}, "unknown key 'stepps'; did you mean 'steps'?"),
        ({"steps": []}, "steps: Tuple should have at least 1 item"),
        ({"steps": [{}]}, "steps.0: a step has either faults or scale"),
        ({"steps": [{**STEP, "scale": {"hosts": 2}}]}, "steps.0: a step has either faults or scale"),
        ({"steps": [{**STEP, "evry": "2s"}]}, "steps.0: unknown key 'evry'; did you mean 'every'?"),
        ({"steps": [{**STEP, "every": "2 parsecs"}]}, "steps.0.every: '2 parsecs' is no duration; write 500ms, 5s"),
        ({"steps": [{**STEP, "every": 0}]}, "steps.0: every: it must be above 0"),
        ({"steps": [{**STEP, "every": "2s"}]}, "steps.0: without times, or a duration of the script, it would never"),
        ({"steps": [{**STEP, "when": "coverd"}]}, "steps.0.when: Input should be 'covered', 'whole' or 'moving'"),
        ({"steps": [{**STEP, "target": "everyone"}]}, "steps.0: target: 'everyone' is none of: random host"),
        ({"steps": [{"target": "router", "faults": [{"kind": "slow", "factor": 2}]}]}, "only fault is kill"),
        ({"steps": [{"faults": [{"kind": "kill_node"}]}]}, "kill_node is for a node"),
        ({"steps": [{"faults": [{"kind": "kil"}]}]}, "steps.0.faults.0.kind: Input should be 'slow'"),
        ({"steps": [{"faults": [{"kind": "slow"}]}]}, "steps.0.faults.0: factor: 1.0 makes nothing slow"),
        ({"steps": [{"faults": [{"kind": "pause"}]}]}, "steps.0.faults.0: seconds: a pause needs some"),
        ({"steps": [{"faults": [{"kind": "kill"}, {"kind": "kill"}]}]}, "steps.0: faults: each kind once"),
        ({"steps": [{"faults": [{"kind": "kill"}, {"kind": "silence"}]}]}, "kill must be alone in its step"),
        ({"url": "http://127.0.0.1:8000"}, "mesh, url: a script has one of them"),
        ({"mesh": None}, "mesh, url: a script has one of them"),
        ({"must": {"succes": 1}}, "must: unknown key 'succes'; did you mean 'success'?"),
    ],
)
def test_a_wrong_script_is_refused_by_its_key(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_script(SCRIPT | changes, "mine.yaml")
    assert str(caught.value).startswith("mine.yaml: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_script_that_is_nowhere_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        ConfigError, match=r"script: 'kill-host' is none of ours \(corrupt, kill-anyway, kill-controller"
    ):
        load_script("kill-host")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: .*No such file"):
        load_script("nowhere.yaml")


def test_durations_are_written_with_units() -> None:
    texts = {"500ms": 0.5, "5s": 5.0, "1.5m": 90.0, "1h": 3600.0, "7": None}
    for text, seconds in texts.items():
        values = SCRIPT | {"patience": text}
        if seconds is None:
            with pytest.raises(ConfigError, match="no duration"):
                parse_script(values, "mine.yaml")
        else:
            assert parse_script(values, "mine.yaml").patience == seconds


def test_the_short_form_changes_only_what_repeats() -> None:
    steps = [STEP, {**STEP, "when": "covered", "times": 200}, {**STEP, "every": "2s"}]
    values = SCRIPT | {"steps": steps, "duration": "3m", "short": {"times": 2, "clients": 3, "duration": "20s"}}
    short = parse_script(values, "mine.yaml").shortened()
    assert [step.times for step in short.steps] == [None, 2, 2]
    assert (short.duration, short.load.clients) == (20.0, 3)
