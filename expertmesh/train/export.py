"""Writes the model folder: the checkpoint, the held-out samples, and the account of how it came to be.

Owns the folder's files. Does not train and computes no figure. Invariant: the folder is a plain transformers
checkpoint; our own files stand beside it and nothing that loads the model needs them.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from expertmesh.train.model import END_OF_TEXT_ID

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

    from expertmesh.train.sources import Document

SAMPLE_BYTES = 20_000
PIECE_CHARS = 4_000

GENERATION = GenerationConfig(
    do_sample=True, temperature=0.7, top_p=0.95, eos_token_id=END_OF_TEXT_ID, pad_token_id=END_OF_TEXT_ID
)


def save_all(
    folder: Path,
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    samples: Mapping[str, str],
    account: Mapping[str, Any],
) -> None:
    """Write everything but `NOTICE`, which people wrote."""
    save_weights(model, folder)
    tokenizer.save_pretrained(folder)
    save_heldout(samples, folder)
    save_account(account, folder)


def save_weights(model: Qwen3MoeForCausalLM, folder: Path) -> None:
    """Write the model in bfloat16, leaving the one in memory as it is."""
    shipped = copy.deepcopy(model).to(torch.bfloat16)
    shipped.generation_config = GENERATION
    shipped.save_pretrained(folder)


def save_heldout(samples: Mapping[str, str], folder: Path) -> None:
    """Write each domain's held-out sample to `heldout/DOMAIN.txt`."""
    (folder / "heldout").mkdir(parents=True, exist_ok=True)
    for domain, text in samples.items():
        (folder / "heldout" / f"{domain}.txt").write_text(text, encoding="utf-8")


def heldout_sample(documents: Sequence[Document]) -> str:
    """Join the openings of held-out documents, whole lines only, to about SAMPLE_BYTES bytes."""
    sample = ""
    for document in documents:
        piece = document.text[:PIECE_CHARS]
        sample += piece[: piece.rfind("\n") + 1] + "\n"
        if len(sample.encode()) >= SAMPLE_BYTES:
            break
    return sample


def save_account(account: Mapping[str, Any], folder: Path) -> None:
    """Write `training.json` for programs and `README.md` for people; both say the same."""
    (folder / "training.json").write_text(json.dumps(account, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme(account), encoding="utf-8")


def readme(account: Mapping[str, Any]) -> str:
    """Say in words what `training.json` holds."""
    lines = [
        "# The tiny model",
        "",
        f"A Mixture-of-Experts language model of {account['parameters'] / 1e6:.1f}M parameters: "
        f"{account['layers']} layers of {account['experts']} experts, {account['experts_per_token']} for each token. "
        f"It only continues text. It was trained on windows of {account['window']} tokens; "
        "longer contexts are accepted, and quality fades.",
        "",
        "| domain | source | licence | held-out loss, nats per token | bits per byte |",
        "| --- | --- | --- | --- | --- |",
    ]
    for domain, entry in account["domains"].items():
        lines.append(
            f"| {domain} | {entry['source']} | {entry['licence']} "
            f"| {entry['heldout_loss']:.3f} | {entry['heldout_bits_per_byte']:.3f} |"
        )
    use = account["expert_use"]
    own = ", ".join(f"{domain} {sum(shares) / len(shares):.0%}" for domain, shares in use["own_experts_share"].items())
    lines += [
        "",
        f"The gates tell the domains apart. Share of a domain's tokens that goes to the experts which serve it more "
        f"than any other domain (without specialisation about {1 / len(account['domains']):.0%}): {own}. "
        f"The least used expert gets {min(use['least_share_of_even']):.2f} of an even share.",
        "",
        "`training.json` has all figures. `heldout/` has text of each domain that the model has not seen. "
        "`NOTICE` has the sources' licences.",
        "",
        "Train it again, on a Debian or Ubuntu machine:",
        "",
        f"    {account['command']}",
        "",
        "## What it writes",
        "",
    ]
    for domain, text in account["samples"].items():
        lines += [f"{domain}:", "", *(f"    {line}" for line in text.rstrip().splitlines()), ""]
    return "\n".join(lines)
