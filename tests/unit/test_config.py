"""Config files: ours all load, and a mistake gets one line that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from expertmesh.config import ExpertsSection, MeshConfig, parse_config
from expertmesh.config_file import load_config
from expertmesh.errors import ConfigError
from expertmesh.gates.spec import GateSpec
from expertmesh.kernels.formats import FORMATS

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_config_is_ours_and_serves(path: Path) -> None:
    file = load_config(path)
    ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert MeshConfig.model_validate(file.mesh.model_dump(mode="json")) == file.mesh


def test_the_models_that_people_ask_for_have_configs() -> None:
    names = {path.stem for path in FILES}
    assert names >= {"tiny", "olmoe", "qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-20b", "deepseek-v2-lite"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": "tiny"}, "config: unknown key 'modle'; did you mean 'model'?"),
        ({"pools": [{"memroy": "1GiB"}]}, "config: pools.0: unknown key 'memroy'; did you mean 'memory'?"),
        ({"router": {"zzz": 1}}, "config: router: unknown key 'zzz'; known keys: replicas, device"),
        ({"pools": [{"hosts": 0}]}, "config: pools.0: hosts: 0 must lie between min, 0, and max, 0, above 0"),
        ({"pools": [{"memory": "lots"}]}, "config: pools.0.memory: could not parse value and unit from byte string"),
        ({"pools": []}, "config: pools: at least one is needed"),
        ({"pools": [{"name": "a"}, {"name": "a"}]}, "config: pools: at least one is needed, each with another name"),
        ({"pools": [{"device": "cuda"}]}, "config: pools.0: gpus: a pool with device cuda needs more than 0"),
        (
            {"experts": {"min_replicas": 3}},
            "config: experts.min_replicas: 3 copies need as many hosts; the pools have 2",
        ),
        ({"network": {"tls": {"ca": "x", "key": "y"}}}, "config: network.tls.certificate: Field required"),
        ({"gateway": {"api_keys": [{"name": "a", "sha256": "plain"}]}}, "config: gateway.api_keys.0.sha256: String sh"),
        ({"gate": {"strategy": "topp", "top_p": 0.5}}, "config: gate: gate.strategy 'topp' is unknown: did you mean"),
        ({"gate": {"strategy": "top-p"}}, "config: gate: gate.top_p is missing: the strategy top-p needs it"),
        ({"gate": {"strategy": "softmax-topk", "k": 0}}, "config: gate: gate.k is 0: use at least 1"),
        ({"gate": {"strategy": "softmax-topk", "kk": 2}}, "config: gate: unknown key 'kk'; did you mean 'k'?"),
        (
            {"gate": {"strategy": "switch", "capacity_factor": 0, "depends_on_batch": True}},
            "config: gate: gate.capacity_factor 0 gives a capacity below one token",
        ),
        (
            {"gate": {"strategy": "gshard", "capacity_factor": 1.25}},
            "config: gate: gate.capacity_factor of gshard makes a token's experts depend on the others of its batch,"
            " so that answers would differ from batch to batch: set gate.depends_on_batch to true",
        ),
        ({"gate": {"strategy": "hash", "k": 2}}, "config: gate: gate.strategy hash needs token_T and table_VK, which"),
        ({"dtype": "int3"}, "config: dtype: Input should be 'float32', 'bfloat16' or 'float16'"),
    ],
)
def test_a_mistake_is_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(proxy_locaton="x"), "proxy_locaton: unknown key; did you mean 'proxy_location'?"),
        (lambda d: d["applications"][0].update(arg={}), "applications.arg: unknown key; did you mean 'args'?"),
        (lambda d: d["applications"].clear(), "exactly one must have import_path expertmesh.app:build, not 0"),
        (lambda d: d["applications"][0]["args"].update(modle="x"), "did you mean 'model'?"),
        (lambda d: d["http_options"].update(port="many"), "http_options.port: Input should be a valid integer"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path: Path, change, message: str) -> None:
    document = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
    change(document)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_gate_is_what_the_config_says_and_for_any_layer() -> None:
    assert MeshConfig().gate is None
    told = {"strategy": "threshold", "k": 2, "ratio": 0.5, "normalize": True}
    gate = parse_config({"gate": told}).gate
    assert gate is not None
    assert gate.spec == GateSpec(**told)
    assert gate.spec.for_layer(16) == GateSpec(**told, num_experts=16)
    with pytest.raises(ConfigError, match=r"gate\.k is 2, but the layer has 1 experts"):
        gate.spec.for_layer(1)
    batched = {"strategy": "switch", "capacity_factor": 1.0}
    allowed = parse_config({"gate": batched | {"depends_on_batch": True}}).gate
    assert allowed is not None
    assert allowed.spec == GateSpec(**batched)


@pytest.mark.parametrize("text", ["a: [1", "- 1", "", "applications: 3"])
def test_a_file_that_is_no_config_is_one_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(path)


def test_a_file_that_is_not_there_is_one_error() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(Path("nowhere.yaml"))


def test_a_config_may_name_every_weight_format_and_no_other() -> None:
    named = get_args(ExpertsSection.model_fields["weight_format"].annotation)
    assert named == tuple(FORMATS)
    assert parse_config({"experts": {"weight_format": "int8"}}).experts.weight_format == "int8"
    with pytest.raises(ConfigError, match=r"experts\.weight_format: Input should be 'dense', 'int8'"):
        parse_config({"experts": {"weight_format": "int3"}})
