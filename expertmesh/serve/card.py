"""What is served, from a config and the checkpoint's own files: the same answer in gateway and router."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, GenerationConfig

from expertmesh.checkpoint.source import resolve
from expertmesh.errors import CheckpointError, ConfigError
from expertmesh.serve.backend import ModelCard

if TYPE_CHECKING:
    from pathlib import Path

    from expertmesh.config import MeshConfig

DEFAULT_MAX_CONTEXT = 8192
"""More than this is taken from the cache of all requests only when the config asks for it."""


def model_card(config: MeshConfig) -> ModelCard:
    """Raises CheckpointError for a model without a readable config, ConfigError for a context it cannot have."""
    path = resolve(config.model)
    try:
        text = AutoConfig.from_pretrained(path).get_text_config(decoder=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}/config.json: {error}") from error
    trained_for: int | None = getattr(text, "max_position_embeddings", None)
    wanted = config.router.max_context
    if wanted is not None and trained_for is not None and wanted > trained_for:
        raise ConfigError(f"router.max_context: {wanted} exceeds the {trained_for} positions the model was made for")
    return ModelCard(
        name=config.name,
        root=config.model,
        max_context=wanted or min(trained_for or DEFAULT_MAX_CONTEXT, DEFAULT_MAX_CONTEXT),
        vocab_size=text.vocab_size,
        created=int((path / "config.json").stat().st_mtime),
        eos_token_ids=_eos_token_ids(path, text),
    )


def _eos_token_ids(path: Path, text: Any) -> tuple[int, ...]:
    """The generation config's word counts, and the model config's where that has none."""
    try:
        eos = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        eos = None
    eos = eos if eos is not None else getattr(text, "eos_token_id", None)
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
