"""Engines: many requests in, one event per token out, over a transformers causal language model.

Read api.py for the contract, then threaded.py (the thread and its queue), batch.py (one request's life), sampling.py
(how a token is chosen), and one of the two batches: continuous.py or simple.py. What runs on CPU cores is helped by
linears.py, norms.py and attention.py.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from expertmesh.engine.config import EngineConfig
from expertmesh.errors import ConfigError

if TYPE_CHECKING:
    from expertmesh.engine.batch import RowGates
    from expertmesh.engine.threaded import ThreadedEngine

__all__ = ["EngineConfig", "EngineKind", "make_engine"]

EngineKind = Literal["auto", "continuous", "simple"]

_log = logging.getLogger(__name__)


def make_engine(
    model: Any, config: EngineConfig, kind: EngineKind = "auto", gates: RowGates | None = None
) -> ThreadedEngine:
    """Start an engine over `model`, a transformers causal language model in the dtype and on the device it is to run.

    "auto" takes continuous batching where the paged cache can hold what the model keeps per token, and else the simple
    engine. With `gates`, the model's, a request may have one of its own. The model is the engine's alone until `close`.
    Raises ConfigError when `kind` cannot run it.
    """
    # Late, because this package also names values for those who have no use for torch.
    from expertmesh.engine.continuous import ContinuousBatch, why_not_continuous
    from expertmesh.engine.simple import SimpleBatch
    from expertmesh.engine.threaded import ThreadedEngine

    name = type(model).__name__
    obstacle = None if kind == "simple" else why_not_continuous(model)
    if kind == "continuous" and obstacle is not None:
        raise ConfigError(f"engine is 'continuous', which cannot run {name}: {obstacle}; use 'auto' or 'simple'")
    model.eval()
    if kind == "simple" or obstacle is not None:
        _log.info("engine for %s: simple (%s)", name, obstacle or "as configured")
        return ThreadedEngine(model, SimpleBatch(model, config, gates), config, gates)
    _log.info("engine for %s: continuous batching", name)
    return ThreadedEngine(model, ContinuousBatch(model, config, gates), config, gates)
