"""What one gateway process counts and times, for Prometheus. Knows nothing of what requests say."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from expertmesh.clock import Clock

_PREFIX = "expertmesh_"
_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 30.0)
_LONG_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)


class ServeMetrics:
    """The gateway's metrics. A choice is one sequence generated: a request has prompts times `n` of them."""

    def __init__(self, registry: CollectorRegistry, clock: Clock) -> None:
        self.registry = registry
        self._clock = clock
        self.http_requests = Counter(
            _PREFIX + "http_requests", "HTTP requests answered", ["route", "status"], registry=registry
        )
        self.in_flight = Gauge(_PREFIX + "http_requests_in_flight", "HTTP requests being answered", registry=registry)
        self.choices = Counter(_PREFIX + "choices", "Choices ended", ["finish_reason"], registry=registry)
        shared: list[Counter | Gauge | Histogram] = [
            prompt := Counter(_PREFIX + "prompt_tokens", "Tokens of prompts", registry=registry),
            generated := Counter(_PREFIX + "generation_tokens", "Tokens generated", registry=registry),
            running := Gauge(_PREFIX + "num_requests_running", "Choices being generated", registry=registry),
            first := _seconds("time_to_first_token_seconds", "A choice's first token", _SHORT_S, registry),
            between := _seconds("inter_token_latency_seconds", "A choice's next token", _SHORT_S, registry),
            total := _seconds("e2e_request_latency_seconds", "A choice's last token", _LONG_S, registry),
        ]
        self.prompt_tokens, self.generation_tokens, self._running = prompt, generated, running
        self._first_token, self._next_token, self._last_token = first, between, total
        registry.register(_VllmNames(shared))

    @contextmanager
    def choice(self) -> Iterator[ChoiceMeter]:
        """Meter one choice from now to its end, however it ends."""
        meter = ChoiceMeter(self, self._clock)
        finish_reason = "error"
        self._running.inc()
        try:
            yield meter
            finish_reason = meter.finish_reason
            self._last_token.observe(meter.age_s)
        except (asyncio.CancelledError, GeneratorExit):
            finish_reason = "abort"
            raise
        finally:
            self._running.dec()
            self.choices.labels(finish_reason).inc()

    def observe_tokens(self, num_tokens: int, wait_s: float, *, first: bool) -> None:
        """Tokens that came together share the time that they took."""
        self.generation_tokens.inc(num_tokens)
        if first:
            self._first_token.observe(wait_s)
        else:
            for _ in range(num_tokens):
                self._next_token.observe(wait_s / num_tokens)


class ChoiceMeter:
    """Times one choice's tokens."""

    def __init__(self, metrics: ServeMetrics, clock: Clock) -> None:
        self.finish_reason = "error"
        self._metrics = metrics
        self._clock = clock
        self._start_s = self._last_s = clock.monotonic()
        self._is_first = True

    @property
    def age_s(self) -> float:
        return self._clock.monotonic() - self._start_s

    def tokens(self, num_tokens: int) -> None:
        """`num_tokens` have just come."""
        now_s = self._clock.monotonic()
        if num_tokens:
            self._metrics.observe_tokens(num_tokens, now_s - self._last_s, first=self._is_first)
            self._last_s, self._is_first = now_s, False


class _VllmNames(Collector):
    """The same metrics under the names that dashboards and load generators made for vLLM look for."""

    def __init__(self, metrics: list[Counter | Gauge | Histogram]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for source in self._metrics:
            for metric in source.collect():
                copy = Metric(metric.name.replace(_PREFIX, "vllm:"), metric.documentation, metric.type)
                for sample in metric.samples:
                    copy.samples.append(sample._replace(name=sample.name.replace(_PREFIX, "vllm:")))
                yield copy


def _seconds(name: str, what: str, buckets: tuple[float, ...], registry: CollectorRegistry) -> Histogram:
    return Histogram(_PREFIX + name, what, buckets=buckets, registry=registry)
