"""The sides of `expertmesh bench decode`: who decodes, each in a process of its own.

A side is made over a checkpoint and decodes many prompts at once, drawing each token from the model's whole
distribution. Does not know who it is compared with. Invariant: what it reports is the pace while every stream runs.

Shapes: R streams, V vocabulary.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from expertmesh.engine.api import TokenEvent
    from expertmesh.hosts.process import HostProcess
    from expertmesh.placement import Placement

Decode = Callable[[list[list[int]], int], float]
"""Write so many tokens after each prompt: tokens per second, of all streams together."""
DecodeSide = Callable[[Path], AbstractContextManager[Decode]]
"""Makes everything ready over the checkpoint in a folder."""

NUM_THREADS = 2
"""Of a side in one process; ours has one in the router and one in each host."""
NUM_HOSTS = 2
MAX_REQUESTS, MAX_CONTEXT, MAX_BATCH_TOKENS = 64, 256, 512


def pace(stamps: Sequence[Sequence[float]]) -> float:
    """Tokens per second from the stream's last to begin until the first to end; `stamps` has each token's second."""
    begin, end = max(of[0] for of in stamps), min(of[-1] for of in stamps)
    return sum(begin < stamp <= end for of in stamps for stamp in of) / (end - begin)


# --- ours ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mesh(folder: Path) -> Iterator[Decode]:
    """A router in this process and two hosts, as the product runs them, on local sockets."""
    from expertmesh.allocator import FORWARD_BYTES, keep_freed_memory
    from expertmesh.backbone import load_backbone
    from expertmesh.engine import EngineConfig, make_engine
    from expertmesh.hosts.process import HostProcess
    from expertmesh.moe.exchange import Exchange
    from expertmesh.moe.layer import MoeLayer
    from expertmesh.transport.network import NetworkTransport

    keep_freed_memory(FORWARD_BYTES)
    torch.set_num_threads(1)
    token = secrets.token_urlsafe()
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(HostProcess(token, memory="4GiB")) for _ in range(NUM_HOSTS)]
        placement = asyncio.run(_fill(processes, token, folder))
        exchange = Exchange(NetworkTransport(token), placement)
        stack.callback(exchange.close)
        backbone = load_backbone(folder)
        backbone.connect([MoeLayer(exchange, layer) for layer in range(len(backbone.moe_modules))])
        limits = EngineConfig(
            max_requests=MAX_REQUESTS,
            max_context=MAX_CONTEXT,
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_queue=MAX_REQUESTS,
            kv_tokens=MAX_REQUESTS * MAX_CONTEXT,
        )
        engine = make_engine(backbone.model, limits)
        stack.callback(engine.close)
        yield lambda prompts, num_tokens: _decode(engine, prompts, num_tokens)


async def _fill(processes: Sequence[HostProcess], token: str, folder: Path) -> Placement:
    """Load every second expert to each host."""
    from expertmesh.checkpoint.index import index_checkpoint
    from expertmesh.hosts.configuration import configuration_for
    from expertmesh.ids import ExpertId, HostId
    from expertmesh.placement import Placement
    from expertmesh.transport.grpc_control import GrpcHostControl

    index = index_checkpoint(folder)
    hosts = tuple(process.info(HostId(f"host-{i}")) for i, process in enumerate(processes))
    replicas = {
        ExpertId(layer, e): (hosts[e % len(hosts)].id,)
        for layer, num_experts in enumerate(index.num_experts)
        for e in range(num_experts)
    }
    for host in hosts:
        control = GrpcHostControl(host, token)
        await control.configure(configuration_for(index, str(folder)))
        for expert, holders in replicas.items():
            if host.id in holders:
                await control.load(expert, index.recipes[expert])
        await control.close()
    return Placement(epoch=1, hosts=hosts, num_experts=index.num_experts, replicas=replicas)


def _decode(engine: Any, prompts: list[list[int]], num_tokens: int) -> float:
    from expertmesh.engine.api import FINISH_LENGTH, GenerateRequest, SamplingParams

    stamps: list[list[float]] = [[] for _ in prompts]
    finished = threading.Semaphore(0)

    def on_event(event: TokenEvent) -> None:
        assert event.finish_reason in (None, FINISH_LENGTH), event.error
        stamps[int(event.request_id)].append(time.perf_counter())
        if event.finish_reason is not None:
            finished.release()

    for stream, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=num_tokens, seed=stream, ignore_eos=True)
        engine.submit(GenerateRequest(request_id=str(stream), prompt_ids=tuple(prompt), sampling=sampling), on_event)
    for _ in prompts:
        finished.acquire()
    return pace(stamps)


# --- transformers ----------------------------------------------------------------------------------------------------


def _whole_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(NUM_THREADS)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).eval()


@contextlib.contextmanager
def continuous_batching(folder: Path) -> Iterator[Decode]:
    """transformers' continuous batching, with its own choice of attention and experts."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    page_size = 256
    manager = _whole_model(folder).init_continuous_batching(
        generation_config=GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=page_size,
            num_blocks=MAX_REQUESTS * MAX_CONTEXT // page_size,
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_requests_per_batch=MAX_REQUESTS,
        ),
    )
    manager.start()

    def decode(prompts: list[list[int]], num_tokens: int) -> float:
        manager.add_requests(prompts, max_new_tokens=num_tokens, record_timestamps=True)
        results = [manager.get_result() for _ in prompts]
        assert all(result.error is None and len(result.generated_tokens) == num_tokens for result in results)
        return pace([result.timestamps for result in results])

    try:
        yield decode
    finally:
        manager.stop(block=True)


@contextlib.contextmanager
def plain_batch(folder: Path) -> Iterator[Decode]:
    """The shortest loop there is over transformers' model and cache: no request ever joins or leaves."""
    model = _whole_model(folder)

    @torch.inference_mode()
    def decode(prompts: list[list[int]], num_tokens: int) -> float:
        next_RL, cache, stamps = torch.tensor(prompts), None, []
        for _ in range(num_tokens):
            output = model(input_ids=next_RL, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            next_RL = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1)
            next_RL.tolist()
            stamps.append(time.perf_counter())
        return pace([stamps] * len(prompts))

    yield decode
