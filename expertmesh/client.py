"""How programs talk to a running mesh over HTTP: look at it, and order something of it.

Owns the connections and the token that orders need; knows nothing of what the answers mean. Invariant: whatever goes
wrong is a ConfigError of one line.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import httpx

from expertmesh.credentials import TOKEN_VARIABLE, shared_token, token_file
from expertmesh.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"


def fetch(url: str, path: str) -> Any:
    """What the mesh at `url` answers to a GET of `path`. Raises ConfigError when nothing does."""
    return _answer("GET", url, path)


def order(url: str, what: str, **values: Any) -> None:
    """Order something of the mesh at `url`, with this machine's shared token. Raises ConfigError when it refuses."""
    _answer("POST", url, f"/mesh/{what}", json=values, headers={"authorization": f"Bearer {shared_token()}"})


@cache
def _client() -> httpx.Client:
    return httpx.Client(timeout=30)


def _answer(method: str, url: str, path: str, **options: Any) -> Any:
    try:
        answer = _client().request(method, f"{url.rstrip('/')}{path}", **options)
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise ConfigError(
                f"token: the mesh at {url} has another; set {TOKEN_VARIABLE} as where it was started, or copy "
                f"{token_file()} from there"
            )
        if answer.is_error and (reason := _reason(answer)):
            raise ConfigError(reason)
        answer.raise_for_status()
        return answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"no mesh answers at {url}{path}: {reason}; is it running? (--url says where)") from error


def _reason(answer: httpx.Response) -> str | None:
    """What the mesh says is wrong; None when it is somebody else who answers."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None
