"""The engine: one thread that owns the model, and the queue in front of it.

Owns admission, delivery, cancellation and failure. Does not know how a batch is computed (batch.py). Invariant: every
request that `submit` took gets exactly one last event, or none once it is cancelled; and no two forwards ever run at
the same time.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch

from expertmesh.engine.api import FINISH_ERROR, EngineStatistics, GenerateRequest, PromptLogprobs, TokenEvent
from expertmesh.engine.batch import Batch, Generation
from expertmesh.engine.linears import pack_gates, pack_linears
from expertmesh.engine.norms import replace_norms
from expertmesh.engine.sampling import Choice, SamplingState
from expertmesh.engine.score import score_prompt
from expertmesh.errors import (
    ConfigError,
    ExpertMeshError,
    InvalidRequestError,
    NotFiniteError,
    OverloadedError,
    RouterGoneError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from expertmesh.engine.batch import RowGates
    from expertmesh.engine.config import EngineConfig
    from expertmesh.gates.spec import GateSpec

_log = logging.getLogger(__name__)


class ThreadedEngine:
    """An `Engine` over a `Batch`. The thread runs from construction to `close`."""

    def __init__(self, model: Any, batch: Batch, config: EngineConfig, gates: RowGates | None = None) -> None:
        self._model = model
        self._gates = gates
        self._batch = batch
        self._config = config
        self._restore_layers = pack_linears(model), pack_gates(model), replace_norms(model)
        self._vocab_size: int = model.config.get_text_config().vocab_size
        self._eos_token_ids = _eos_token_ids(model)
        self._keys = itertools.count()
        self._after_events: Callable[[], object] = lambda: None
        self._num_generated = 0
        self._num_steps = 0

        # Everything below is shared with callers and guarded by the lock, which is also held while an event is
        # delivered: that is what makes "no event after cancel" true. It can be re-entered from within `on_event`.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._live: dict[str, Generation] = {}
        self._queue: deque[Generation] = deque()
        self._cancelled: list[Generation] = []
        self._scores: deque[tuple[tuple[int, ...], int, GateSpec | None, Future[PromptLogprobs]]] = deque()
        self._is_closing = False
        self._end: str | None = None
        """Why the thread ended or will not take more, once that is so."""

        self._thread = threading.Thread(target=self._run, name="expertmesh-engine", daemon=True)
        self._thread.start()

    # --- for any thread ----------------------------------------------------------------------------------------------

    @property
    def max_context(self) -> int:
        return self._config.max_context

    def submit(self, request: GenerateRequest, on_event: Callable[[TokenEvent], object]) -> None:
        self._check(request)
        generation = Generation(
            key=str(next(self._keys)),
            request=request,
            on_event=on_event,
            sampling=SamplingState(request, self._eos_token_ids),
        )
        with self._lock:
            self._check_open()
            if request.request_id in self._live:
                raise InvalidRequestError(f"request {request.request_id} is already running", param="request_id")
            num_waiting = self._num_waiting()
            if request.num_resumed:  # its client is reading already, so it goes first
                self._queue.appendleft(generation)
            elif num_waiting < self._config.max_queue:
                self._queue.append(generation)
            else:
                raise OverloadedError(f"{num_waiting} requests are waiting (max_queue); retry later")
            self._live[request.request_id] = generation
            self._changed.notify()

    def after_events(self, tell: Callable[[], object]) -> None:
        self._after_events = tell

    def cancel(self, request_id: str) -> None:
        with self._lock:
            generation = self._live.pop(request_id, None)
            if generation is None:
                return
            if generation in self._queue:
                self._queue.remove(generation)
            else:
                self._cancelled.append(generation)
                self._changed.notify()

    def score(self, prompt_ids: tuple[int, ...], top_logprobs: int, gate: GateSpec | None = None) -> PromptLogprobs:
        self._check_prompt(prompt_ids)
        self._check_gate(gate)
        if self._model.config.is_encoder_decoder:
            raise InvalidRequestError(
                "this model's encoder reads the prompt, which has no log-probabilities", param="echo"
            )
        if len(prompt_ids) > self.max_context:
            raise InvalidRequestError(
                f"the prompt has {len(prompt_ids)} tokens; the model's context is {self.max_context}", param="prompt"
            )
        result: Future[PromptLogprobs] = Future()
        with self._lock:
            self._check_open()
            if len(self._scores) >= self._config.max_queue:
                raise OverloadedError(f"{len(self._scores)} prompts wait to be scored (max_queue); retry later")
            self._scores.append((prompt_ids, top_logprobs, gate, result))
            self._changed.notify()
        return result.result()

    def statistics(self) -> EngineStatistics:
        with self._lock:
            num_waiting = self._num_waiting()
            return EngineStatistics(
                running=len(self._live) - num_waiting,
                waiting=num_waiting,
                generated_tokens=self._num_generated,
                steps=self._num_steps,
            )

    @property
    def healthy(self) -> bool:
        with self._lock:
            return self._end is None

    def wait_end(self) -> None:
        self._thread.join()

    def close(self) -> None:
        with self._lock:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()
        self._batch.close()
        for restore in self._restore_layers:
            restore()

    def _num_waiting(self) -> int:
        return len(self._queue) + self._batch.num_waiting

    def _check_open(self) -> None:
        if self._end is not None or self._is_closing:
            raise RouterGoneError(f"the engine takes no more requests: {self._end or 'it is closing'}")

    def _check(self, request: GenerateRequest) -> None:
        """Refuse what can never succeed, or would fail the step that it shares with others."""
        self._check_prompt(request.prompt_ids)
        params = request.sampling
        num_prompt = len(request.prompt_ids) - request.num_resumed
        assert 0 <= request.num_resumed < len(request.prompt_ids), "the prompt itself cannot be resumed"
        if params.max_tokens <= request.num_resumed:
            raise InvalidRequestError(
                f"max_tokens is {params.max_tokens}; it must exceed the {request.num_resumed} tokens generated already",
                param="max_tokens",
            )
        if num_prompt + params.max_tokens > self.max_context:
            raise InvalidRequestError(
                f"the prompt has {num_prompt} tokens and max_tokens is {params.max_tokens}; together they exceed the "
                f"model's context of {self.max_context}",
                param="max_tokens",
            )
        self._check_ids(params.logit_bias, "logit_bias")
        self._check_ids(params.stop_token_ids, "stop_token_ids")
        self._check_gate(request.gate)

    def _check_prompt(self, prompt_ids: tuple[int, ...]) -> None:
        if not prompt_ids:
            raise InvalidRequestError("the prompt is empty; it needs at least one token", param="prompt")
        self._check_ids(prompt_ids, "prompt")

    def _check_gate(self, gate: GateSpec | None) -> None:
        if gate is None:
            return
        if self._gates is None:
            raise InvalidRequestError("gate: this model's gate cannot be changed; leave gate out", param="gate")
        assert gate.is_alone, "a request's gate must not look at other requests"
        try:
            self._gates.check(gate)
        except ConfigError as error:
            raise InvalidRequestError(str(error), param="gate") from error

    def _check_ids(self, token_ids: Any, param: str) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequestError(
                    f"{param} has token id {token_id}; the vocabulary has ids 0 to {self._vocab_size - 1}", param=param
                )

    # --- for the engine's thread -------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        end = "it was closed"
        try:
            while self._wait_for_work():
                self._score_next()
                self._admit()
                self._step()
                self._after_events()
        except Exception as error:  # noqa: BLE001 - the thread's boundary
            _log.exception("the engine's thread ended")
            end = f"its thread ended with {_describe(error)}"
        self._finish_all(end)
        self._after_events()

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do, and forget what was cancelled. False means to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self._live or self._cancelled or self._scores)
            for generation in self._cancelled:
                self._batch.remove(generation)
            self._cancelled.clear()
            return not self._is_closing

    def _score_next(self) -> None:
        with self._lock:
            if not self._scores:
                return
            prompt_ids, num_top, gate, result = self._scores.popleft()
        try:
            result.set_result(score_prompt(self._model, prompt_ids, num_top, gate, self._gates))
        except Exception as error:  # noqa: BLE001 - the caller's to handle, not the thread's
            result.set_exception(error)

    def _admit(self) -> None:
        with self._lock:
            while self._queue and self._batch.has_room(self._queue[0]):
                self._batch.add(self._queue.popleft())

    def _step(self) -> None:
        scheduled = self._batch.schedule()
        if not scheduled:
            return
        self._num_steps += 1
        try:
            choices = self._batch.run()
        except Exception as error:  # noqa: BLE001 - one step's failure must not reach the other requests
            _log.warning("a step of %d requests failed: %s", len(scheduled), _describe(error))
            for generation in scheduled:
                self._fail(generation, str(error), error)
            return
        for generation, choice in choices:
            self._accept(generation, choice)

    def _accept(self, generation: Generation, choice: Choice | None) -> None:
        if choice is None:
            error = NotFiniteError("the model's logits are not finite")
            self._fail(generation, str(error), error)
            return
        event = generation.accept(choice)
        self._num_generated += 1
        self._deliver(generation, event)
        if event.finish_reason is not None:
            self._batch.remove(generation)

    def _fail(self, generation: Generation, error: str, cause: BaseException | None = None) -> None:
        self._batch.remove(generation)
        self._deliver(generation, _error_event(generation, error, cause))

    def _deliver(self, generation: Generation, event: TokenEvent) -> None:
        request_id = generation.request.request_id
        with self._lock:
            if self._live.get(request_id) is not generation:
                return
            if event.finish_reason is not None:
                del self._live[request_id]
            try:
                generation.on_event(event)
            except Exception:  # noqa: BLE001 - the caller's code; its failure must not reach the other requests
                _log.exception("the listener of request %s failed; the request is cancelled", request_id)
                self.cancel(request_id)

    def _finish_all(self, end: str) -> None:
        with self._lock:
            self._end = end
            self._queue.clear()
            gone = RouterGoneError(f"the engine has stopped: {end}")
            for generation in list(self._live.values()):
                self._deliver(generation, _error_event(generation, str(gone), gone))
            for *_, result in self._scores:
                result.set_exception(gone)
            self._scores.clear()


def _error_event(generation: Generation, error: str, cause: BaseException | None = None) -> TokenEvent:
    ours = cause if isinstance(cause, ExpertMeshError) else None
    return TokenEvent(request_id=generation.request.request_id, finish_reason=FINISH_ERROR, error=error, cause=ours)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _eos_token_ids(model: Any) -> frozenset[int]:
    for config in (model.generation_config, model.config.get_text_config()):
        if (eos := getattr(config, "eos_token_id", None)) is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()
