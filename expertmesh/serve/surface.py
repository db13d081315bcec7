"""What every endpoint shares, in one value."""

from __future__ import annotations

import random
from dataclasses import dataclass

from expertmesh.clock import Clock
from expertmesh.errors import InvalidRequestError
from expertmesh.serve.backend import Backend, Limits, ModelCard
from expertmesh.serve.metrics import ServeMetrics
from expertmesh.serve.text import TextCodec


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """The parts that `create_app` puts together. `codec` is None for a model that is served with token ids only."""

    backend: Backend
    card: ModelCard
    codec: TextCodec | None
    limits: Limits
    clock: Clock
    rng: random.Random
    metrics: ServeMetrics

    def check_model(self, name: str | None) -> None:
        """Raises InvalidRequestError (404) for any model but the one served. None means whichever it is."""
        if name is not None and name != self.card.name:
            raise InvalidRequestError(
                f"the model {name!r} does not exist here; this server has {self.card.name!r}",
                param="model",
                code="model_not_found",
                status=404,
            )

    def require_codec(self, param: str) -> TextCodec:
        """Raises InvalidRequestError naming the field that needs a tokenizer where there is none."""
        if self.codec is None:
            reason = f"{self.card.name!r} is served without a tokenizer: {param} cannot be used; send token ids"
            raise InvalidRequestError(reason, param=param)
        return self.codec

    def new_id(self, prefix: str) -> str:
        return f"{prefix}{self.rng.getrandbits(128):032x}"
