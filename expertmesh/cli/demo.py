"""`expertmesh demo`: the product's story on this machine, with the model that ships with the package.

What it says, it has measured; what it claims, it has checked, and a check that fails ends it with exit code 1.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.text import Text

from expertmesh.cli.console import stdout, steps_shown
from expertmesh.cli.decisions import describe
from expertmesh.cli.heatmap import draw
from expertmesh.cli.reading import (
    Views,
    gained_and_lost,
    imbalance_if_unchanged,
    is_calm,
    only_replicas,
    ready,
    replica_counts,
    share,
    summary,
)
from expertmesh.cli.steady import Outcome, SteadyLoad, ask, stream, unlike
from expertmesh.cli.top import host_table, look
from expertmesh.client import order
from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.errors import ConfigError
from expertmesh.models import PROMPTS, heldout

HOSTS, MOST_HOSTS, CLIENTS = 2, 4, 3
CONFIG = {
    "model": "tiny",
    "dtype": "float32",
    # Room for all experts and some replicas more; the load decides whose.
    "pools": [{"name": "cpu", "hosts": HOSTS, "max": MOST_HOSTS, "memory": "12MB", "target": 1.0}],
    # Nobody wants to watch for minutes: weigh the load every second, and forget it soon.
    "experts": {"half_life_s": 2, "replan_s": 1},
}
FIRST, SECOND = "scripture", "python"
_SHOWN = 3


def demo(
    port: Annotated[int, typer.Option(min=1, max=65535, help="For the mesh that is started.")] = 8080,
) -> None:
    """Serve the tiny model, change the topic, add a host, kill one; check that no request fails and no answer changes.

    It takes a minute or two.

    Example:

        expertmesh demo
    """
    from expertmesh.config import parse_config  # late: `--help` need not wait for Ray
    from expertmesh.config_file import ServeFile
    from expertmesh.deploy import deployed

    file = ServeFile(serve={}, app_name="expertmesh", route_prefix="/", mesh=parse_config(CONFIG, "demo"))
    say("[bold]expertmesh[/] serves a Mixture-of-Experts model with its experts in processes of their own.")
    say(f"Starting Ray, one router (the dense model) and {HOSTS} hosts (the experts) on this machine.")
    started_s = SYSTEM_CLOCK.monotonic()
    with contextlib.ExitStack() as stack:
        with steps_shown() as show:
            url = stack.enter_context(deployed(file, port=port, report=show))
        say(f"Ready after {SYSTEM_CLOCK.monotonic() - started_s:.0f} s at [bold]{url}[/], an OpenAI-compatible server.")
        story = Story(url)
        story.tell()
    story.check(not any(map(_is_host, story.pids)), f"stopped: none of the {len(story.pids)} host processes is left")
    took_s = SYSTEM_CLOCK.monotonic() - started_s
    if story.num_failed:
        say(f"\n[bold red]{story.num_failed} of {story.num_checks} checks failed[/], in {took_s:.0f} s.")
        raise typer.Exit(1)
    say(
        f"\nAll {story.num_checks} checks held, in {took_s:.0f} s. Next: [bold]expertmesh serve tiny[/], with "
        "[bold]expertmesh top[/] in another terminal, and the README."
    )


def say(text: str) -> None:
    stdout.print(text, highlight=False)


class Story:
    """What is told of the mesh at `url`, in order. A chapter measures, says, and checks."""

    def __init__(self, url: str) -> None:
        self.num_checks = 0
        self.num_failed = 0
        self.pids: set[int] = set()
        """Processes of all hosts that were seen."""
        self._url = url
        self._num_decisions = 0
        self._prompts = {topic: [heldout(topic)[at : at + 160] for at in range(0, 3600, 900)] for topic in PROMPTS}
        self._references: dict[str, list[int]] = {}

    def tell(self) -> None:
        self._stream_text()
        self._note_references()
        with SteadyLoad(self._url, self._prompts[FIRST], clients=CLIENTS, clock=SYSTEM_CLOCK) as load:
            self._show_experts()
            self._add_host()
            self._shift_topic(load)
            self._kill_host(load)
            self._scale_down()
        _heading("In all")
        self.check_answers(load.outcomes, f"the {len(load.outcomes)} requests")

    def check(self, is_so: bool, text: str) -> None:
        """Say what was checked, and whether it is so."""
        self.num_checks += 1
        self.num_failed += not is_so
        say(f"[bold green]✓[/] {text}" if is_so else f"[bold red]✗ not so:[/] {text}")

    def check_answers(self, outcomes: list[Outcome], which: str) -> None:
        """Hold answers against the undisturbed ones."""
        failed = [outcome.error for outcome in outcomes if outcome.error]
        different = unlike(outcomes, self._references)
        self.check(not failed, f"none of {which} failed" + (f" ({len(failed)} did: {failed[0]})" if failed else ""))
        self.check(not different, f"each of {which} got the undisturbed answer, token by token")

    # --- the chapters ------------------------------------------------------------------------------------------------

    def _stream_text(self) -> None:
        _heading("A completion, as it streams")
        stdout.out(PROMPTS[FIRST], end="", style="dim", highlight=False)
        with httpx.Client(timeout=120) as client:
            options = {"prompt": PROMPTS[FIRST], "max_tokens": 60, "temperature": 0.7, "seed": 7}
            for choice in stream(client, self._url, **options):
                stdout.out(choice["text"], end="", highlight=False)
        say("")

    def _note_references(self) -> None:
        """Ask a mesh at rest, one request at a time."""
        prompts = [*self._prompts[FIRST], *self._prompts[SECOND]]
        with httpx.Client(timeout=120) as client, stdout.status("noting the undisturbed answers"):
            for prompt in prompts:
                outcome = Outcome(prompt=prompt)
                ask(client, self._url, outcome, SYSTEM_CLOCK)
                if outcome.error:
                    raise ConfigError(f"the mesh at rest did not answer: {outcome.error}")
                self._references[prompt] = outcome.token_ids
        say(
            f"Noted the undisturbed answers to {len(prompts)} prompts, greedy and in float32. From now on {CLIENTS} "
            "clients ask them over and over, and every answer is held against these."
        )

    def _show_experts(self) -> None:
        views, _ = self._watch(f"under a steady load of {FIRST}", is_calm, 15, at_least_s=8)
        _heading(f"The experts under {FIRST}")
        self._show_heat(views)
        stdout.print(host_table(views["hosts"]))

    def _shift_topic(self, load: SteadyLoad) -> None:
        before = self._new_chapter()
        load.turn_to(self._prompts[SECOND])

        def has_followed(views: Views) -> bool:
            return all(gained_and_lost(before, views)) and is_calm(views)

        views, took_s = self._watch(f"the topic is {SECOND} now", has_followed, 30, at_least_s=12)
        gained, lost = gained_and_lost(before, views)
        _heading(f"The topic turned to {SECOND}: hot experts gain replicas, cold ones lose them")
        self._show_heat(views)
        was, now = (replica_counts(at["placement"]) for at in (before, views))
        shown = (*gained[:_SHOWN], *lost[:_SHOWN])
        for layer, index in shown:
            part, part_before = (share(at, (layer, index)) for at in (views, before))
            say(
                f"  expert {f'{layer}:{index}':<5} {was[layer][index]} → {now[layer][index]} replicas, with {part:.0%} "
                f"of its layer's load, after {part_before:.0%}"
            )
        self._show_reasons(shown)
        stale = [ratio or 1.0 for ratio in imbalance_if_unchanged(before, views)]
        worst = stale.index(max(stale))
        current = views["load"]["imbalance_of_layers"][worst] or 1.0
        say(
            f"In layer {worst} the slowest host takes {current:.2f} times the ideal now; it would take "
            f"{stale[worst]:.2f} times, had the placement stayed as it was for {FIRST}."
        )
        summed_up = f"{len(gained)} hot experts have gained replicas, {len(lost)} cold ones have lost them"
        self.check(bool(gained and lost), f"{summed_up}; level again after {took_s:.0f} s")

    def _add_host(self) -> None:
        _heading(f"A host more: expertmesh scale cpu {HOSTS + 1}")
        self._new_chapter()
        order(self._url, "scale", pool="cpu", hosts=HOSTS + 1)
        views, took_s = self._watch("a host joins", lambda views: _num_holding(views) == HOSTS + 1, 40)
        self._show_decisions(views, "start host", "host ready", "plan")
        stdout.print(host_table(views["hosts"]))
        self.check(_num_holding(views) == HOSTS + 1, f"{_num_holding(views)} hosts share the load after {took_s:.1f} s")

    def _kill_host(self, load: SteadyLoad) -> None:
        self._watch("waiting until all clients are in the middle of answers", lambda _: load.num_streaming > 1, 20)
        before = self._new_chapter()
        only = only_replicas(before["placement"])
        victim = max(ready(before), key=lambda host: only[host["id"]])
        if not _is_host(victim["pid"]):
            raise ConfigError(f"host {victim['id']} runs on another machine; run the demo where no Ray cluster is")
        num_before = len(load.outcomes)
        num_hit = load.strike()
        os.kill(victim["pid"], signal.SIGKILL)
        _heading(f"kill -9 {victim['pid']}: host {victim['id']} dies while {num_hit} answers stream")
        say(f"It held {victim['replicas']} replicas, {only[victim['id']]} of them the only one of their expert.")
        known = {host["id"] for host in before["hosts"]}

        def is_replaced(views: Views) -> bool:
            return _num_holding(views) == HOSTS + 1 and any(host["id"] not in known for host in ready(views))

        views, took_s = self._watch("its replacement comes", is_replaced, 60)
        self._show_decisions(views, "host ended", "start host", "host ready")
        self.check(is_replaced(views), f"its replacement has taken its part after {took_s:.1f} s")
        self._watch("waiting for the answers that it hit", lambda _: _num_struck(load) == num_hit, 60)
        hit = [outcome for outcome in load.outcomes[num_before:] if outcome.was_struck]
        longest_s = max((outcome.longest_wait_s for outcome in hit), default=0.0)
        usual_s = statistics.median(outcome.longest_wait_s for outcome in load.outcomes[:num_before])
        say(f"None of them waited longer than {longest_s:.2f} s for a token ({usual_s:.2f} s is usual).")
        self.check(len(hit) == num_hit > 0, f"all {num_hit} answers that were streaming have come to their end")
        self.check_answers(hit, "these")

    def _scale_down(self) -> None:
        _heading(f"Scale down again: expertmesh scale cpu {HOSTS}")
        self._new_chapter()
        order(self._url, "scale", pool="cpu", hosts=HOSTS)
        views, took_s = self._watch(
            "a host is emptied, then stopped", lambda views: len(views["hosts"]) == HOSTS and is_calm(views), 40
        )
        self._show_decisions(views, "drain host", "host ended")
        self.check(len(views["hosts"]) == HOSTS, f"{len(views['hosts'])} hosts hold every expert after {took_s:.1f} s")

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _watch(
        self, what: str, is_done: Callable[[Views], bool], limit_s: float, *, at_least_s: float = 0.0
    ) -> tuple[Views, float]:
        """Look twice a second, with live figures, until it is done or time is up.

        The last look, and after how long it was done for the first time of those that lasted until then.
        """
        pause = threading.Event()
        started_s = SYSTEM_CLOCK.monotonic()
        done_s: float | None = None
        with stdout.status(what) as status:
            while True:
                views = look(self._url)
                self.pids |= {host["pid"] for host in views["hosts"]}
                passed_s = SYSTEM_CLOCK.monotonic() - started_s
                done_s = (passed_s if done_s is None else done_s) if is_done(views) else None
                if passed_s >= limit_s or (passed_s >= at_least_s and done_s is not None):
                    return views, passed_s if done_s is None else done_s
                status.update(f"{what}: {summary(views['placement'], views['load'])}")
                pause.wait(0.5)

    def _new_chapter(self) -> Views:
        """A look at the mesh; decisions are told from here on."""
        views = look(self._url)
        self._num_decisions = len(views["decisions"])
        return views

    def _show_heat(self, views: Views) -> None:
        say(f"{summary(views['placement'], views['load'])}. Each expert's load, and its replicas where it has more:")
        stdout.print(draw(views["load"]["per_second"], title="", replicas=replica_counts(views["placement"])))

    def _show_decisions(self, views: Views, *kinds: str) -> None:
        """What was decided in this chapter, a line each."""
        for entry in views["decisions"][self._num_decisions :]:
            if entry["what"] in kinds:
                _print_line(describe(entry, most=0))

    def _show_reasons(self, experts: Sequence[tuple[int, int]]) -> None:
        """What the decision log says of these experts' last changes."""
        reasons = {}
        for entry in look(self._url)["decisions"][self._num_decisions :]:
            for change in entry.get("changes", ()):
                layer, index = change["expert"]
                reasons[layer, index] = f"{change['what']} {layer}:{index} on {change['host']}: {change['why']}"
        say("The decision log says why:")
        for reason in (reasons[expert] for expert in experts if expert in reasons):
            stdout.print(Text(f"  {reason}", style="dim"))


def _heading(text: str) -> None:
    stdout.print(Text(f"\n{text}", style="bold"))


def _print_line(text: Text) -> None:
    stdout.print(text, no_wrap=True, overflow="ellipsis")


def _num_holding(views: Views) -> int:
    """How many ready hosts hold replicas, if all hosts are ready."""
    return sum(bool(host["replicas"]) for host in ready(views)) if len(ready(views)) == len(views["hosts"]) else 0


def _num_struck(load: SteadyLoad) -> int:
    """How many of the requests that were struck have ended."""
    return sum(outcome.was_struck for outcome in load.outcomes)


def _is_host(pid: int) -> bool:
    """Whether a process of this machine is a host of ours."""
    try:
        return b"HostActor" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
