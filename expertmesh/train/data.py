"""Documents to batches: the split of training from held-out text, and the windows that a step learns from.

Owns which document is held out and which tokens a batch holds. Does not know where text comes from. Invariant: whether
a document is held out depends on its domain and name alone, so no run ever learns from another run's held-out text.

Shapes: B windows of a batch, T tokens of a window, N tokens of a stream.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tokenizers import Tokenizer

    from expertmesh.train.sources import Corpus, Document

HELD_OUT_SHARE = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One domain's documents, divided."""

    domain: str
    train: tuple[Document, ...]
    heldout: tuple[Document, ...]


def split(corpus: Corpus) -> Split:
    """Hold out about HELD_OUT_SHARE of the documents, chosen by a hash of their names.

    The documents of each part come in the order of that hash: any prefix of them is a fair sample.
    """
    ranked = sorted((_rank(corpus.domain, document.name), document) for document in corpus.documents)
    return Split(
        domain=corpus.domain,
        train=tuple(document for rank, document in ranked if rank >= HELD_OUT_SHARE),
        heldout=tuple(document for rank, document in ranked if rank < HELD_OUT_SHARE),
    )


def _rank(domain: str, name: str) -> float:
    """Map a document's name to a number in [0, 1) that looks random."""
    digest = hashlib.sha256(f"{domain}/{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def prefix(documents: Sequence[Document], num_bytes: int) -> tuple[str, ...]:
    """Return the texts of the first documents, as many as it takes to reach `num_bytes`."""
    texts: list[str] = []
    total = 0
    for document in documents:
        if total >= num_bytes:
            break
        texts.append(document.text)
        total += len(document.text.encode())
    return tuple(texts)


def encode(texts: Sequence[str], tokenizer: Tokenizer, *, end: int) -> Tensor:
    """Join texts to one stream of int64 tokens, each text followed by the token `end`."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        ids += encoding.ids
        ids.append(end)
    return torch.tensor(ids, dtype=torch.int64)


def mixed_batches(streams_N: Sequence[Tensor], *, windows: int, length: int, seed: int) -> Iterator[Tensor]:
    """Yield batches without end, each with `windows` random windows of `length` tokens from every stream.

    Every batch holds all domains in equal parts, so a balance over the batch leaves each expert free to prefer one.
    """
    for stream_N in streams_N:
        assert len(stream_N) > length, "a stream must be longer than a window"
    generator = torch.Generator().manual_seed(seed)
    while True:
        batch: list[Tensor] = []
        for stream_N in streams_N:
            starts = torch.randint(len(stream_N) - length, (windows,), generator=generator)
            batch += [stream_N[start : start + length] for start in starts.tolist()]
        yield torch.stack(batch)
