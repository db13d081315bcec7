"""Where the shared token comes from, and who may read it."""

from __future__ import annotations

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from expertmesh.credentials import TOKEN_VARIABLE, shared_token, token_file
from expertmesh.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write_token(text: str, permissions: int = 0o600) -> None:
    token_file().parent.mkdir(exist_ok=True)
    token_file().write_text(text)
    token_file().chmod(permissions)


def test_the_first_use_makes_a_token_that_only_its_user_can_read(home: Path) -> None:
    previous = os.umask(0)
    try:
        token = shared_token(make=True)
    finally:
        os.umask(previous)
    assert len(token) >= 32
    assert token_file() == home / ".expertmesh" / "token"
    assert (mode(token_file()), mode(token_file().parent)) == (0o600, 0o700)
    assert list(token_file().parent.iterdir()) == [token_file()]


def test_all_who_ask_later_get_the_same(home: Path) -> None:
    token = shared_token(make=True)
    assert shared_token() == shared_token(make=True) == token


def test_those_who_ask_first_at_the_same_moment_agree(home: Path) -> None:
    start = threading.Barrier(8)

    def ask(_: int) -> str:
        start.wait()
        return shared_token(make=True)

    with ThreadPoolExecutor(8) as askers:
        assert set(askers.map(ask, range(8))) == {shared_token()}
    assert list(token_file().parent.iterdir()) == [token_file()]


def test_who_only_looks_makes_none(home: Path) -> None:
    with pytest.raises(ConfigError, match=f"there is none here; set {TOKEN_VARIABLE}"):
        shared_token()
    assert list(home.iterdir()) == []


def test_the_environment_goes_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write_token("from-the-file\n")
    assert shared_token() == "from-the-file"
    monkeypatch.setenv(TOKEN_VARIABLE, "from-the-environment")
    assert shared_token(make=True) == "from-the-environment"


@pytest.mark.parametrize("permissions", [0o640, 0o604, 0o660, 0o610])
@pytest.mark.parametrize("make", [False, True])
def test_a_file_that_others_can_reach_is_refused(permissions: int, make: bool) -> None:
    write_token("secret", permissions)
    with pytest.raises(ConfigError, match="chmod 600"):
        shared_token(make=make)


@pytest.mark.parametrize("text", ["", "\n", "two words", "naïve", "a\nb", "x\x00"])
def test_a_token_that_cannot_travel_in_a_header_is_refused(text: str) -> None:
    write_token(text)
    with pytest.raises(ConfigError, match="printable ASCII") as refused:
        shared_token()
    assert "\n" not in str(refused.value)


def test_a_home_that_takes_no_file_is_named(home: Path) -> None:
    (home / ".expertmesh").write_text("not a folder")
    with pytest.raises(ConfigError, match=rf"{home}/.expertmesh.*set {TOKEN_VARIABLE}"):
        shared_token(make=True)
