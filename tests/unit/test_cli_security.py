"""`expertmesh certs` and `expertmesh key`: what they print can go into a config as it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from expertmesh.cli import main
from expertmesh.config import parse_config
from expertmesh.serve.keys import hash_of
from expertmesh.tls import read_identity


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expertmesh", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_certs_prints_a_config_with_which_a_mesh_can_start(command, tmp_path: Path) -> None:
    code, out, err = command("certs", tmp_path / "a folder", "--days", 7)
    assert code == 0
    files = parse_config(yaml.safe_load(out)).network.tls_files
    assert read_identity(files).key.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert str(tmp_path / "a folder" / "node") in err


def test_certs_renews_in_place_and_only_when_told_to(command, tmp_path: Path) -> None:
    _, out, _ = command("certs", tmp_path)
    files = parse_config(yaml.safe_load(out)).network.tls_files
    first = read_identity(files)
    code, _, err = command("certs", tmp_path)
    assert (code, "--renew" in err, read_identity(files)) == (2, True, first)
    assert command("certs", tmp_path, "--renew")[0] == 0
    second = read_identity(files)
    assert (second.ca == first.ca, second.certificate == first.certificate) == (True, False)


def test_a_key_is_shown_once_and_its_hash_goes_into_the_config(command) -> None:
    code, out, _ = command("key", 'alice: the "first"')
    key, _, config = out.partition("\n")
    (of,) = parse_config(yaml.safe_load(config)).gateway.api_keys
    assert (code, of.name, of.sha256) == (0, 'alice: the "first"', hash_of(key))
    assert key not in config
    assert command("key", "bob")[1].partition("\n")[0] != key


def test_a_key_is_for_somebody(command) -> None:
    assert command("key", " ")[0] == 2
