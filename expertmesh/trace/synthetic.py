"""Loads made up from a seed: how skewed the experts' loads are, and how that changes over time.

Every kind starts from a Zipf law, the r-th most popular of a layer's experts being chosen in proportion to r^-skew,
with its own order of experts in every layer. The kinds differ in what moves:

    zipf     nothing
    drift    experts gain and lose rank by a random walk; the law stays exactly the same at every moment
    bursts   now and then an expert is suddenly 10 times as popular, for a while
    diurnal  the number of tokens and the mix of two topics swing in a sine wave, day and night
    topics   one topic gives way to another at once; each has its own order of experts

Pure and deterministic: equal options give equal loads, byte for byte, on one numpy version.

Shapes: L layers, E experts per layer.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from expertmesh.errors import ConfigError
from expertmesh.ids import MAX_EXPERTS, MAX_LAYERS
from expertmesh.trace.format import TraceHeader, encode_header, encode_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

Kind = Literal["zipf", "drift", "bursts", "diurnal", "topics"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CHANGE_S: dict[Kind, float] = {"zipf": 1.0, "drift": 7200.0, "bursts": 300.0, "diurnal": 86_400.0, "topics": 1800.0}
"""The time scale of each kind's change: after how long ranks are forgotten (drift), the mean length of a burst or of a
topic, the period of diurnal. For zipf it says nothing."""
NUM_TOPICS = 6
BURST_FACTOR = 10.0
BURSTS_AT_ONCE = 2.0
"""Per layer, on average."""
SWING = 0.6
"""By how much of their mean the tokens of a diurnal load rise and fall."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticOptions:
    """What to make. Raises ConfigError for what cannot be made."""

    kind: Kind
    layers: int = 61
    experts: int = 256
    top_k: int = 8
    windows: int = 360
    window_s: float = 10.0
    tokens_per_s: float = 2000.0
    skew: float = 1.0
    """The exponent of the Zipf law; 0 makes all experts alike."""
    pace_s: float | None = None
    """Takes the place of the kind's `CHANGE_S`."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind: {self.kind!r} is none of {', '.join(KINDS)}")
        for name, most in (("layers", MAX_LAYERS), ("experts", MAX_EXPERTS), ("windows", 10**9)):
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"{name}: {getattr(self, name)} is not between 1 and {most}")
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"top_k: {self.top_k} is not between 1 and the number of experts, {self.experts}")
        for name in ("window_s", "tokens_per_s", "change_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                field = "pace_s" if name == "change_s" else name
                raise ConfigError(f"{field}: {getattr(self, name)} is not a number above 0")
        if self.window_s * self.tokens_per_s > 1e15:
            raise ConfigError("tokens_per_s: more than 1e15 tokens in a window")
        if not 0 <= self.skew <= 10:
            raise ConfigError(f"skew: {self.skew} is not between 0 and 10")

    @property
    def change_s(self) -> float:
        """The time scale of the change."""
        return CHANGE_S[self.kind] if self.pace_s is None else self.pace_s


def generate(options: SyntheticOptions) -> Iterator[NDArray[np.int64]]:
    """The rows_LE of each window in turn.

    The tokens of a window choose independently, each an expert at most once, so rows are binomial; their sum is
    tokens * top_k on average.
    """
    rng = np.random.default_rng(options.seed)
    for tokens, popularity_LE in _popularity(options, rng):
        yield rng.binomial(tokens, inclusion(popularity_LE, options.top_k))


def write_trace(options: SyntheticOptions) -> Iterator[bytes]:
    """The pieces of a trace file with these loads."""
    yield encode_header(
        TraceHeader(
            model=f"synthetic-{options.kind}",
            num_experts=(options.experts,) * options.layers,
            top_k=options.top_k,
            content="rows",
            origin={"synthetic": asdict(options) | {"pace_s": options.change_s}},
        )
    )
    for number, rows_LE in enumerate(generate(options)):
        yield b"".join(encode_rows(number * options.window_s, layer, rows_E) for layer, rows_E in enumerate(rows_LE))


def inclusion(popularity_LE: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """How likely a token is to choose each expert: in proportion to its popularity, at most 1, top_k in all."""
    chosen_LE: NDArray[np.float64] = popularity_LE / popularity_LE.sum(1, keepdims=True) * top_k
    while (chosen_LE > 1).any():  # each round settles at least one more expert of those layers at 1
        open_LE = chosen_LE < 1
        left_L = top_k - (~open_LE).sum(1)
        scale_L = left_L / chosen_LE.sum(1, where=open_LE, initial=1e-300)
        chosen_LE = np.where(open_LE, chosen_LE * scale_L[:, None], 1.0)
    return chosen_LE


def _popularity(options: SyntheticOptions, rng: np.random.Generator) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Each window's number of tokens, and its popularity_LE."""
    law_E = np.arange(1, options.experts + 1, dtype=np.float64) ** -options.skew
    shape = (options.layers, options.experts)
    tokens = round(options.window_s * options.tokens_per_s)

    def order() -> NDArray[np.float64]:
        return rng.permuted(np.broadcast_to(law_E, shape), axis=1)

    kept = math.exp(-options.window_s / options.change_s)
    times_s = np.arange(options.windows) * options.window_s
    match options.kind:
        case "zipf":
            popularity_LE = order()
            for _ in times_s:
                yield tokens, popularity_LE
        case "drift":
            # A score per expert that forgets itself at the given pace (an Ornstein-Uhlenbeck process) gives the ranks.
            score_LE = rng.standard_normal(shape)
            for _ in times_s:
                yield tokens, law_E[(-score_LE).argsort(1).argsort(1)]
                score_LE = kept * score_LE + math.sqrt(1 - kept**2) * rng.standard_normal(shape)
        case "bursts":
            popularity_LE = order()
            at_once = min(0.5, BURSTS_AT_ONCE / options.experts)
            bursting_LE = rng.random(shape) < at_once
            for _ in times_s:
                yield tokens, popularity_LE * np.where(bursting_LE, BURST_FACTOR, 1.0)
                draw_LE = rng.random(shape)
                bursting_LE = np.where(
                    bursting_LE, draw_LE < kept + (1 - kept) * at_once, draw_LE < (1 - kept) * at_once
                )
        case "diurnal":
            day_LE, night_LE = order(), order()
            for swing in np.sin(2 * np.pi * times_s / options.change_s):
                yield round(tokens * (1 + SWING * swing)), day_LE * (1 + swing) + night_LE * (1 - swing)
        case "topics":
            topics = [order() for _ in range(NUM_TOPICS)]
            current = 0
            for _ in times_s:
                yield tokens, topics[current]
                if rng.random() > kept:
                    current = (current + 1 + int(rng.integers(NUM_TOPICS - 1))) % NUM_TOPICS
