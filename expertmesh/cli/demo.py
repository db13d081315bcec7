"""`expertmesh demo`: the product's story on this machine, with the model that ships with the package."""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import typer

from expertmesh.cli.console import stdout, steps_shown
from expertmesh.cli.heatmap import busiest, draw
from expertmesh.cli.status import fetch, status

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKENS = 90


def demo(
    port: Annotated[int, typer.Option(min=1, max=65535, help="For the mesh that is started.")] = 8080,
) -> None:
    """Serve the tiny model on two host processes, stream text in each domain, draw which experts fired, stop.

    Example:

        expertmesh demo
    """
    from expertmesh.deploy import deployed, for_model
    from expertmesh.models import PROMPTS

    say = stdout.print
    say("[bold]expertmesh[/] serves a Mixture-of-Experts model with its experts in processes of their own.\n")
    say("Starting Ray, one router (the dense model) and two hosts (the experts) on this machine.")
    file = for_model("tiny", hosts=2, min_replicas=1, dtype="float32")
    with contextlib.ExitStack() as stack:
        with steps_shown() as show:
            url = stack.enter_context(deployed(file, port=port, report=show))
        say(f"Ready at [bold]{url}[/], an OpenAI-compatible server:\n")
        status(url)
        used = {domain: _complete(url, domain, prompt) for domain, prompt in PROMPTS.items()}
        say("\nEvery token chose its experts at every layer. These fired (bright is busy):\n")
        for domain, layers in used.items():
            say(draw(layers, title=domain))
        _tell_difference(used)
    say("\nStopped: no process is left. Next: [bold]expertmesh serve tiny[/], and the README.")


def _complete(url: str, domain: str, prompt: str) -> list[list[int]]:
    """Stream a completion to the terminal: the load that it put on each layer's experts."""
    stdout.print(f"\n[bold]{domain}[/]: a completion, streamed token by token")
    before = fetch(url, "/mesh/load")["layers"]
    started, count = time.perf_counter(), 0
    stdout.print(f"[dim]{_escaped(prompt)}[/]", end="", highlight=False)
    for text in stream(url, prompt):
        stdout.out(text, end="", highlight=False)
        count += 1
    took_s = time.perf_counter() - started
    stdout.print(f"\n[dim]{count} pieces in {took_s:.1f} s[/]")
    after = fetch(url, "/mesh/load")["layers"]
    return [[b - a for a, b in zip(*rows, strict=True)] for rows in zip(before, after, strict=True)]


def stream(url: str, prompt: str) -> Iterator[str]:
    """The pieces of a seeded completion as they arrive."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0.7, "seed": 7, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if line.startswith("data: ") and data != "[DONE]":
                chunk: dict[str, Any] = json.loads(data)
                yield from (choice["text"] for choice in chunk["choices"])


def _tell_difference(used: dict[str, list[list[int]]]) -> None:
    """Name the busiest experts of each domain in the layer where the domains differ most."""

    def share(layer: list[int]) -> list[float]:
        return [load / max(1, sum(layer)) for load in layer]

    def distance(layer: int) -> float:
        shares = [share(layers[layer]) for layers in used.values()]
        return float(sum(max(of_expert) - min(of_expert) for of_expert in zip(*shares, strict=True)))

    num_layers = len(next(iter(used.values())))
    clearest = max(range(num_layers), key=distance)
    stdout.print(f"In layer {clearest}, where the domains differ most, the busiest experts are")
    for domain, layers in used.items():
        shares = share(layers[clearest])
        names = ", ".join(f"{expert} ({shares[expert]:.0%})" for expert in busiest(layers[clearest]))
        stdout.print(f"  {domain:<12} {names}", highlight=False)


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")
