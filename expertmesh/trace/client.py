"""Fetching a trace from a running mesh, whose gateway streams it while it is being recorded.

The file holds exactly the bytes that came, and each is checked before it is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

from expertmesh.client import authorization
from expertmesh.errors import ConfigError, TraceError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from expertmesh.trace.format import TraceDecoder

SILENCE_S = 30.0
"""For how long after its time a recording may say nothing before it is given up."""


def record(
    address: str,
    seconds: float,
    path: Path,
    decoder: TraceDecoder,
    report: Callable[[TraceDecoder], None] = lambda _: None,
) -> None:
    """Write `seconds` of the routing of the mesh at `address` to `path`; `decoder` knows how much came.

    Nothing is written before a good header has come. However this ends, what was written can be read. Raises
    ConfigError when no mesh answers, TraceError when what comes is no trace or breaks off.
    """
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"seconds: {seconds} is not above 0")
    url = f"{address.rstrip('/')}/mesh/trace"
    timeout = httpx.Timeout(10.0, read=seconds + SILENCE_S)
    try:
        headers = authorization(address)
        with httpx.stream("GET", url, params={"seconds": seconds}, headers=headers, timeout=timeout) as answer:
            if answer.is_error:
                raise ConfigError(f"address: {url} answers {answer.status_code} {answer.reason_phrase}")
            _save(answer, path, decoder, report)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        if decoder.header is None:
            raise ConfigError(f"address: no trace comes from {url}: {error}") from error
        raise TraceError(f"the recording broke off ({error}): {path} holds {decoder.num_records} records") from error
    decoder.finish()


def _save(answer: httpx.Response, path: Path, decoder: TraceDecoder, report: Callable[[TraceDecoder], None]) -> None:
    early = b""  # what comes before the header is whole
    chunks = answer.iter_bytes()
    for chunk in chunks:
        list(decoder.feed(chunk))
        early += chunk
        if decoder.header is not None:
            break
    else:
        return
    try:
        with path.open("wb") as file:
            file.write(early)
            for chunk in chunks:
                list(decoder.feed(chunk))
                file.write(chunk)
                file.flush()
                report(decoder)
    except OSError as error:
        raise ConfigError(f"output: {path}: {error.strerror or error}") from error
