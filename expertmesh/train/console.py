"""What the person sees while text is fetched and a model is trained. Everything goes to standard error."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from expertmesh.train import data, sources

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from expertmesh.train.data import Split
    from expertmesh.train.loop import Step
    from expertmesh.train.sources import Corpus

stderr = Console(stderr=True)


def fetch(cache: Path) -> tuple[tuple[Corpus, ...], tuple[Split, ...]]:
    """Get every corpus and split it, saying what came. Raises ConfigError as `sources.fetch` does."""
    corpora = sources.fetch(cache)
    splits = tuple(data.split(corpus) for corpus in corpora)
    for corpus, split in zip(corpora, splits, strict=True):
        stderr.print(f"{corpus.domain}: {corpus.source}; {len(split.train)} documents, {len(split.heldout)} held out")
    return corpora, splits


@contextlib.contextmanager
def bar(title: str = "") -> Iterator[Callable[[Step], None]]:
    """A progress bar that follows the steps that it is shown."""
    columns = (
        TextColumn("{task.description}{task.completed:,} tokens"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr) as progress:
        task = progress.add_task(title, total=None, loss=math.nan)
        yield lambda step: progress.update(task, completed=step.tokens, total=step.budget, loss=step.loss)
