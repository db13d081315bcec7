"""The commands: `python -m expertmesh.train --out FOLDER` makes the tiny model, and `... compare` tries every balance.

Owns the order of the work and what the person sees meanwhile. Every other module of the package is used here and knows
nothing of the rest. Invariant: what it writes describes itself fully.
"""

from __future__ import annotations

import sys
from pathlib import Path  # noqa: TC003 - typer reads annotations
from typing import TYPE_CHECKING, Annotated

import torch
import transformers
import typer

from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.errors import ConfigError
from expertmesh.gates.measures import balancedness
from expertmesh.models import DOMAINS, tiny_path
from expertmesh.train import data, export, loop, model, report, tokenizer
from expertmesh.train.balance import BALANCES, balance_named, fitted, steer
from expertmesh.train.budget import TimeBudget, TokenBudget
from expertmesh.train.compare import compare
from expertmesh.train.console import bar, fetch, stderr
from expertmesh.train.sources import CACHE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from expertmesh.train.balance import SteeredGates

OUT = tiny_path()
TOKENS = 6_000_000
WINDOWS = 2
SHIPPED_BALANCE = "aux"
TOKENIZER_BYTES = 2_000_000
STEPS_BETWEEN_SAVES = 100

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train the tiny model that ships with the package, or compare what keeps its experts in use.",
)
app.command()(compare)


@app.callback(invoke_without_command=True)
def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")] = OUT,
    tokens: Annotated[int, typer.Option(min=10_000, help="Tokens to train on.")] = TOKENS,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Train for about this long instead; the tokens it took are recorded.")
    ] = None,
    balance: Annotated[str, typer.Option(help=f"What keeps experts in use: {', '.join(BALANCES)}.")] = SHIPPED_BALANCE,
    seed: Annotated[int, typer.Option(help="Seeds the weights and the batches.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    cache: Annotated[Path, typer.Option(help="Folder that keeps downloads, and the model in the making.")] = CACHE,
) -> None:
    """Train the tiny model and write it, with its held-out samples and figures, to a folder.

    Whatever the balance, the folder is a plain checkpoint, whose gate is softmax and the two best experts, and the
    figures are of that: a selection bias has no place in it, and experts cannot choose where text comes token by token.

    Example: nice python -m expertmesh.train --out /tmp/tiny --tokens 1000000
    """
    if context.invoked_subcommand is not None:
        return
    pressure = balance_named(balance)
    if balance != SHIPPED_BALANCE and out.resolve() == OUT.resolve():
        raise ConfigError(
            f"out: {out} holds the model that ships, which has the balance {SHIPPED_BALANCE}: name another folder for"
            f" the balance {balance}"
        )
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    corpora, splits = fetch(cache)
    texts = [text for split in splits for text in data.prefix(split.train, TOKENIZER_BYTES)]
    bpe = tokenizer.train_tokenizer(texts, vocab_size=model.VOCAB_SIZE)
    end = model.END_OF_TEXT_ID
    streams_N = [data.encode([document.text for document in split.train], bpe, end=end) for split in splits]

    tiny = model.new_model(fitted(model.tiny_config(), pressure), seed=seed)
    batches_BT = data.mixed_batches(streams_N, windows=WINDOWS, length=model.WINDOW, seed=seed)
    schedule = loop.Schedule()
    budget = TokenBudget(tokens) if minutes is None else TimeBudget(minutes, schedule=schedule, clock=SYSTEM_CLOCK)
    started_s = SYSTEM_CLOCK.monotonic()
    with steer(tiny, pressure) as gates:
        tokens = watch(
            loop.train(tiny, batches_BT, schedule, gates, budget),
            gates,
            save=lambda: export.save_weights(tiny, cache / "unfinished"),
        )
    took_s = SYSTEM_CLOCK.monotonic() - started_s

    stderr.print(f"trained for {took_s / 60:.0f} minutes; measuring")
    tiny = model.round_weights(tiny)
    wrapped = tokenizer.as_transformers(bpe, max_length=model.MAX_LENGTH)
    options = {
        "tokens": tokens,
        "seed": seed,
        "balance": balance,
        "pressure": str(pressure),
        "threads": threads,
        "batch": [len(DOMAINS) * WINDOWS, model.WINDOW],
        "schedule": str(schedule),
        "minutes": round(took_s / 60, 1),
    }
    samples = {split.domain: export.heldout_sample(split.heldout) for split in splits}
    account = report.account(tiny, wrapped, corpora, splits, samples, options)
    export.save_all(out, tiny, wrapped, samples, account)
    stderr.print(f"wrote {out}")


def watch(steps: Iterable[loop.Step], gates: SteeredGates, *, save: Callable[[], None]) -> int:
    """Take all steps, showing where they are and saving now and then; return the budget that they had."""
    budget: int | None = None
    with bar() as show:
        for step in steps:
            budget = step.budget
            show(step)
            if step.number % STEPS_BETWEEN_SAVES == 0:
                save()
                even = min(balancedness(tokens_E) for tokens_E in gates.tokens_LE())
                stderr.print(f"step {step.number}: loss {step.loss:.3f}, balancedness of the worst layer {even:.2f}")
    assert budget is not None, "a run ends only when its budget is spent"
    return budget


def main() -> None:
    """Run a command. What the person can mend is one line on standard error, and exit code 2."""
    try:
        app()
    except ConfigError as error:
        stderr.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
