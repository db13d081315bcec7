"""The whole product as a side of `expertmesh bench decode`: what clients see over HTTP of the same router and hosts.

Owns the mesh that it deploys on a Ray of its own, and the clients. Its pace over that of the router alone is what the
gateway and Serve cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

import httpx

from expertmesh.bench.crowd import chunks, token_ids
from expertmesh.bench.decode_sides import MAX_BATCH_TOKENS, MAX_CONTEXT, MAX_REQUESTS, NUM_HOSTS, Decode, pace
from expertmesh.bench.measure import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def over_http(folder: Path) -> Iterator[Decode]:
    """A client for each stream, to a gateway, a router and hosts as `expertmesh serve` starts them."""
    from expertmesh.config import parse_config
    from expertmesh.config_file import ServeFile
    from expertmesh.deploy import deployed

    logging.disable(logging.WARNING)
    values = {
        "model": str(folder),
        "pools": [{"hosts": NUM_HOSTS, "cpus": 1, "memory": "4GiB"}],
        "experts": {"elastic": False},
        "router": {
            "cpus": 1,
            "max_context": MAX_CONTEXT,
            "max_requests": MAX_REQUESTS,
            "max_batch_tokens": MAX_BATCH_TOKENS,
            "kv_tokens": MAX_REQUESTS * MAX_CONTEXT,
        },
    }
    file = ServeFile(serve={}, app_name="decode", route_prefix="/", mesh=parse_config(values, "bench decode"))
    with deployed(file, port=free_port(), report=lambda progress: None) as url:
        yield lambda prompts, num_tokens: asyncio.run(_decode(url, prompts, num_tokens))


async def _decode(url: str, prompts: list[list[int]], num_tokens: int) -> float:
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        streams = (_stream(http, prompt, num_tokens, seed) for seed, prompt in enumerate(prompts))
        return pace(await asyncio.gather(*streams))


async def _stream(http: httpx.AsyncClient, prompt: list[int], num_tokens: int, seed: int) -> list[float]:
    """When each token came."""
    body = {"prompt": prompt, "max_tokens": num_tokens, "seed": seed, "stream": True}
    body |= {"ignore_eos": True, "return_token_ids": True}
    stamps: list[float] = []
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for chunk in chunks(answer):
            stamps += [time.perf_counter()] * len(token_ids(chunk))
    assert len(stamps) == num_tokens, f"{len(stamps)} tokens came instead of {num_tokens}"
    return stamps
