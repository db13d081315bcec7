"""The models of `expertmesh bench decode`: true shapes, random weights.

Knows transformers' config classes and nothing of who decodes. Invariant: a shape's checkpoint is the same every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen3MoeConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

VOCABULARY = 2048
PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model to decode with."""

    description: str
    config_class: type[Any]
    options: Mapping[str, Any]

    def config(self) -> Any:
        """transformers' configuration of it."""
        ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        return self.config_class(**self.options, **ids, vocab_size=VOCABULARY, max_position_embeddings=4096)


SHAPES = {
    "olmoe": Shape(
        description="8 layers, hidden 1,024, 32 experts of 512, top-4",
        config_class=OlmoeConfig,
        options={
            "num_hidden_layers": 8,
            "hidden_size": 1024,
            "intermediate_size": 512,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 32,
            "num_experts_per_tok": 4,
        },
    ),
    "qwen3": Shape(
        description="4 layers, hidden 2,048, 32 experts of 768, top-8",
        config_class=Qwen3MoeConfig,
        options={
            "num_hidden_layers": 4,
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 32,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
    ),
}


def save_checkpoint(shape: Shape, folder: Path) -> None:
    """Write the model in bfloat16."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16).save_pretrained(folder)


def prompts(num_streams: int) -> list[list[int]]:
    """A prompt for each stream, all of one length, so that plain batches need no padding."""
    generator = torch.Generator().manual_seed(num_streams)
    return torch.randint(VOCABULARY, (num_streams, PROMPT_TOKENS), generator=generator).tolist()
