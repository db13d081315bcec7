"""The command that makes the tiny model: `python -m expertmesh.train --out FOLDER`.

Owns the order of the work and what the person sees meanwhile. Every other module of the package is used here and knows
nothing of the rest. Invariant: what it writes to FOLDER describes itself fully.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.errors import ConfigError
from expertmesh.models import DOMAINS, tiny_path
from expertmesh.train import data, export, loop, model, report, sources, tokenizer
from expertmesh.train.balance import AuxiliaryLoss
from expertmesh.train.budget import TimeBudget, TokenBudget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

OUT = tiny_path()
CACHE = Path.home() / ".cache/expertmesh/train"
TOKENS = 6_000_000
WINDOWS = 2
BALANCE = 0.02
TOKENIZER_BYTES = 2_000_000
STEPS_BETWEEN_SAVES = 100


def main(
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")] = OUT,
    tokens: Annotated[int, typer.Option(min=10_000, help="Tokens to train on.")] = TOKENS,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Train for about this long instead; the tokens it took are recorded.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seeds the weights and the batches.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    cache: Annotated[Path, typer.Option(help="Folder that keeps downloads, and the model in the making.")] = CACHE,
) -> None:
    """Train the tiny model and write it, with its held-out samples and figures, to a folder.

    Example: nice python -m expertmesh.train --out /tmp/tiny --tokens 1000000
    """
    console = Console(stderr=True)
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    try:
        corpora = sources.fetch(cache)
    except ConfigError as error:
        console.print(f"error: {error}", style="red", highlight=False)
        raise typer.Exit(2) from error
    splits = [data.split(corpus) for corpus in corpora]
    for corpus, split in zip(corpora, splits, strict=True):
        console.print(f"{corpus.domain}: {corpus.source}; {len(split.train)} documents, {len(split.heldout)} held out")
    texts = [text for split in splits for text in data.prefix(split.train, TOKENIZER_BYTES)]
    bpe = tokenizer.train_tokenizer(texts, vocab_size=model.VOCAB_SIZE)
    end = model.END_OF_TEXT_ID
    streams_N = [data.encode([document.text for document in split.train], bpe, end=end) for split in splits]

    tiny = model.new_model(model.tiny_config(), seed=seed)
    batches_BT = data.mixed_batches(streams_N, windows=WINDOWS, length=model.WINDOW, seed=seed)
    balance = AuxiliaryLoss(coefficient=BALANCE, top_k=tiny.config.num_experts_per_tok)
    schedule = loop.Schedule()
    budget = TokenBudget(tokens) if minutes is None else TimeBudget(minutes, schedule=schedule, clock=SYSTEM_CLOCK)
    started_s = SYSTEM_CLOCK.monotonic()
    steps = loop.train(tiny, batches_BT, schedule, balance, budget)
    tokens = watch(steps, console=console, save=lambda: export.save_weights(tiny, cache / "unfinished"))
    took_s = SYSTEM_CLOCK.monotonic() - started_s

    console.print(f"trained for {took_s / 60:.0f} minutes; measuring")
    tiny = model.round_weights(tiny)
    wrapped = tokenizer.as_transformers(bpe, max_length=model.MAX_LENGTH)
    options = {
        "tokens": tokens,
        "seed": seed,
        "threads": threads,
        "batch": [len(DOMAINS) * WINDOWS, model.WINDOW],
        "balance": str(balance),
        "schedule": str(schedule),
        "minutes": round(took_s / 60, 1),
    }
    samples = {split.domain: export.heldout_sample(split.heldout) for split in splits}
    account = report.account(tiny, wrapped, corpora, splits, samples, options)
    export.save_all(out, tiny, wrapped, samples, account)
    console.print(f"wrote {out}")


def watch(steps: Iterable[loop.Step], *, console: Console, save: Callable[[], None]) -> int:
    """Take all steps, showing where they are and saving now and then; return the budget that they had."""
    columns = (
        TextColumn("{task.completed:,} tokens"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    budget: int | None = None
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None, loss=math.nan)
        for step in steps:
            budget = step.budget
            progress.update(task, completed=step.tokens, total=budget, loss=step.loss)
            if step.number % STEPS_BETWEEN_SAVES == 0:
                save()
                console.print(f"step {step.number}: loss {step.loss:.3f}, balance penalty {step.penalty:.5f}")
    assert budget is not None, "a run ends only when its budget is spent"
    return budget


if __name__ == "__main__":
    typer.run(main)
