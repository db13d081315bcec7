"""What the commands share: two consoles, and progress while something starts."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from expertmesh.progress import Progress as Step

stdout = Console()
stderr = Console(stderr=True)


@contextlib.contextmanager
def steps_shown() -> Iterator[Callable[[Step], None]]:
    """A progress line that follows what is reported to it; on something else than a terminal, a line per phase."""
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=stderr,
        transient=True,
    )
    task = bars.add_task("", total=None)
    last_phase = ""

    def show(step: Step) -> None:
        nonlocal last_phase
        if step.phase != last_phase and not stderr.is_terminal:
            stderr.print(step.phase, style="dim", markup=False, highlight=False, soft_wrap=True)
        last_phase = step.phase
        bars.update(task, description=step.phase, total=step.total or None, completed=step.done)

    with bars:
        yield show
