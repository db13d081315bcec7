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
    """What the mesh at `url` answers to a GET of `path`; with this machine's shared token, if it asks for a key.

    Raises ConfigError when nothing answers.
    """
    return _answer("GET", url, path)


def order(url: str, what: str, **values: Any) -> Any:
    """Order something of the mesh at `url`, with this machine's shared token. Raises ConfigError when it refuses."""
    return _answer("POST", url, f"/mesh/{what}", json=values, headers=_authorization())


def authorization(url: str) -> dict[str, str]:
    """The headers that the mesh at `url` wants of those who use it; none when nobody answers, as will be seen."""
    try:
        status = _client().get(f"{url.rstrip('/')}/v1/models").status_code
    except (httpx.HTTPError, httpx.InvalidURL):
        return {}
    return _authorization() if status == httpx.codes.UNAUTHORIZED else {}


def _authorization() -> dict[str, str]:
    return {"authorization": f"Bearer {shared_token()}"}


@cache
def _client() -> httpx.Client:
    return httpx.Client(timeout=30)


def _answer(method: str, url: str, path: str, **options: Any) -> Any:
    try:
        answer = _client().request(method, f"{url.rstrip('/')}{path}", **options)
        if answer.status_code == httpx.codes.UNAUTHORIZED and method == "GET":
            answer = _client().request(method, f"{url.rstrip('/')}{path}", headers=_authorization())
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise ConfigError(
                f"token: the mesh at {url} has another; set {TOKEN_VARIABLE} as where it was started, or copy "
                f"{token_file()} from there"
            )
        if answer.is_error and (reason := _reason(answer)):
            raise ConfigError(reason)
        answer.raise_for_status()
        return answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"no mesh answers at {url}{path}: {reason}; is it running, and is that its address?"
        ) from error


def _reason(answer: httpx.Response) -> str | None:
    """What the mesh says is wrong; None when it is somebody else who answers."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None
