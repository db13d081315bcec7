"""`expertmesh bench`: measure this machine, each figure beside its baseline."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from expertmesh.cli.console import stderr, stdout
from expertmesh.cli.trace_report import sparkline
from expertmesh.errors import ConfigError

app = typer.Typer(help="Measure this machine, each figure beside its baseline in the same run.", no_args_is_help=True)


class Shape(enum.StrEnum):
    """What `bench decode` can make."""

    OLMOE = "olmoe"
    QWEN3 = "qwen3"


Picture = Annotated[Path | None, typer.Option(help="Draw it too, to this file (.svg, .png, .pdf).")]
MEASURING = "measuring: the sides take turns"

AsJson = Annotated[bool, typer.Option("--json", help="As JSON, with the machine and the versions.")]


@app.command()
def exchange(
    as_json: AsJson = False,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds in which the sides take turns.")] = 40,
    most_hosts: Annotated[int, typer.Option(min=2, max=4, help="The experts are spread over 1 to so many hosts.")] = 4,
) -> None:
    """What one exchange with 2 hosts costs, beside raw sockets, a bare gRPC stream and Ray actor calls.

    Example:

        expertmesh bench exchange --json
    """
    from expertmesh.bench.exchange import run

    with stderr.status(f"measuring: five sides take turns, then 1 to {most_hosts} hosts"):
        report = run(rounds=rounds, most_hosts=most_hosts)
    if as_json:
        _print_json(report)
        return
    table = Table(title="32 rows of 1,024 bfloat16 to 2 hosts and back", title_style="", box=None, header_style="dim")
    for column in ("", "median ms", "p10", "p90"):
        table.add_column(column, justify="right" if column else "left")
    for side, of in report["milliseconds"].items():
        table.add_row(side, *(f"{of[key]:.3f}" for key in ("median", "p10", "p90")))
    stdout.print(table)
    for text, key in (
        ("The exchange takes {} times the raw sockets", "exchange_over_raw"),
        ("Over gRPC it takes {} times that", "exchange_over_grpc_over_exchange"),
        ("Over gRPC it takes {} times the bare stream", "exchange_over_grpc_over_bare"),
        ("Ray actor calls take {} times the exchange over gRPC", "ray_over_exchange_over_grpc"),
    ):
        of = report[key]
        stdout.print(text.format(f"{of['median']:.2f}") + f" ({of['p10']:.2f} to {of['p90']:.2f}).")
    for text, key in (("", "by_hosts"), (" over gRPC", "by_hosts_over_grpc")):
        added = report[key]["each_further_host"][str(most_hosts)]
        stdout.print(
            f"Each host after the first, of {most_hosts}, adds {added['median']:.0%}{text} "
            f"({added['p10']:.0%} to {added['p90']:.0%})."
        )


@app.command("serve")
def serve_bench(
    as_json: AsJson = False,
    clients: Annotated[int, typer.Option(min=1, help="Streams at the same time.")] = 32,
    seconds: Annotated[float, typer.Option(min=1, help="How long.")] = 60,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of one request.")] = 64,
    port: Annotated[int, typer.Option(help="For the mesh that is started.")] = 8123,
) -> None:
    """Serve the tiny model and stream from it with many clients: time to first token, between tokens, leaks.

    Example:

        expertmesh bench serve --clients 32 --seconds 60 --json
    """
    from expertmesh.bench.serve import run
    from expertmesh.cli.console import steps_shown

    with steps_shown() as show:
        report = run(clients=clients, seconds=seconds, tokens=tokens, port=port, report=show)
    if as_json:
        _print_json(report)
        return
    stdout.print(
        f"{report['requests']} requests by {clients} clients in {seconds:g} s, {report['errors']} errors, "
        f"{report['tokens_per_second']:,.0f} tokens/s"
    )
    for name in ("time_to_first_token_ms", "between_tokens_ms"):
        of = report[name]
        stdout.print(f"{name.removesuffix('_ms').replace('_', ' ')}: p50 {of['p50']:.1f} ms, p99 {of['p99']:.1f} ms")
    stdout.print(f"left behind after shutdown: {report['left_behind']}")


@app.command()
def overload(
    as_json: AsJson = False,
    times: Annotated[float, typer.Option(min=1, help="What is offered, over the peak.")] = 3,
    seconds: Annotated[float, typer.Option(min=1, help="How long the peak is measured, and the overload.")] = 30,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of one request.")] = 64,
    port: Annotated[int, typer.Option(help="For the mesh that is started.")] = 8125,
) -> None:
    """Offer a mesh three times the requests that it can answer: what it still answers, and how fast it refuses.

    Example:

        expertmesh bench overload --json
    """
    from expertmesh.bench.overload import run
    from expertmesh.cli.console import steps_shown

    with steps_shown() as show:
        report = run(times=times, seconds=seconds, tokens=tokens, port=port, report=show)
    if as_json:
        _print_json(report)
        return
    accepted, refused = report["accepted"], report["refused"]
    stdout.print(
        f"Peak {report['peak_tokens_per_second']:,.0f} tokens/s. Offered {times:g} times as much, "
        f"{report['offered_requests_per_second']:.1f} requests/s: {report['goodput_tokens_per_second']:,.0f} tokens/s "
        f"({report['goodput_over_peak']:.0%}), {report['failed']} of {report['requests']} failed."
    )
    of, whole = accepted["time_to_first_token_ms"], accepted["whole_answer_ms"]
    stdout.print(
        f"{accepted['requests']} accepted: first token after {of['p50'] / 1e3:.1f} s (p99 {of['p99'] / 1e3:.1f} s), "
        f"whole answer after {whole['p50'] / 1e3:.1f} s (p99 {whole['p99'] / 1e3:.1f} s)"
    )
    of, wait = refused["time_to_refuse_ms"], refused["retry_after_s"]
    stdout.print(
        f"{refused['requests']} refused, in {of['p50']:.0f} ms (p99 {of['p99']:.0f} ms), and told to come back after "
        f"{wait['p50']:.0f} s; {refused['without_retry_after']} without being told"
    )
    for name, held in report["memory_mib"].items():
        stdout.print(f"{name}: {held['at_peak']:.0f} MiB at the peak, at most {held['most_in_overload']:.0f} MiB then")


@app.command()
def elastic(
    as_json: AsJson = False,
    port: Annotated[int, typer.Option(help="For the meshes that are started.")] = 8124,
    picture: Picture = None,
) -> None:
    """Shift the topic of all requests, then grow a pool from two hosts to four and back: what clients notice.

    Example:

        expertmesh bench elastic --json
    """
    from expertmesh.bench.elastic import BALANCED, run
    from expertmesh.bench.picture import draw_shift
    from expertmesh.cli.console import steps_shown

    with steps_shown() as show:
        report = run(port=port, report=show)
    if picture is not None:
        draw_shift(report, picture)
    if as_json:
        _print_json(report)
        return
    shift, resize = report["shift"], report["resize"]
    hot, cold = shift["hot_experts"], shift["cold_experts"]
    stdout.print(
        f"[bold]The topic shifts[/]: {shift['requests']} requests, {shift['failed']} failed, {shift['wrong_answers']} "
        f"other than undisturbed. Of {hot['experts']} experts that became hot {hot['gained']} gained replicas "
        f"({hot['replicas_before']} to {hot['replicas_after']} in all), of {cold['experts']} that went cold "
        f"{cold['lost']} lost some ({cold['replicas_before']} to {cold['replicas_after']})."
    )
    imbalances = [entry["imbalance"] or 1.0 for entry in shift["timeline"]]
    stdout.print(
        f"The slowest host takes less than {BALANCED} times the mean from {shift['balanced_after_s']} s on; "
        f"over time, 1 to {max(imbalances):.2f}: {sparkline(imbalances, 1.0, max(imbalances))}"
    )
    steady, moving = resize["steady"], resize["moving"]
    stdout.print(
        f"[bold]Two hosts, four, two[/], at half the peak of {resize['peak_tokens_per_second']:,.0f} tokens/s: "
        f"{resize['requests']} requests, {resize['failed']} failed, {resize['wrong_answers']} other than undisturbed. "
        f"Between tokens: {steady['between_tokens_ms']['p99']:.0f} ms (p99) while nothing changes, at most "
        f"{moving['between_tokens_ms']['max']:.0f} ms while hosts come and go; throughput "
        f"{resize['throughput_moving_over_steady']:.0%}. A host serves "
        f"{', '.join(f'{s:.1f}' for s in resize['seconds_from_decision_to_first_row'])} s after the decision."
    )


@app.command()
def balance(
    as_json: AsJson = False,
    seeds: Annotated[int, typer.Option(min=1, help="Loads to plan for, of each shape.")] = 20,
    plans: Annotated[int, typer.Option(min=1, help="Plans in a row while the load wanders.")] = 20,
    picture: Picture = None,
) -> None:
    """What the slowest host takes when the load has drifted from the plan, beside EPLB and lower bounds. Needs no mesh.

    Example:

        expertmesh bench balance --json
    """
    from expertmesh.bench.balance import run
    from expertmesh.bench.picture import draw_balance

    with stderr.status("planning and splitting"):
        report = run(seeds=seeds, plans=plans)
    if picture is not None:
        draw_balance(report, picture)
    if as_json:
        _print_json(report)
        return
    table = Table(title=f"{report['unit']}; mean of {seeds} seeds", title_style="", box=None, header_style="dim")
    table.add_column()
    for name in report["cases"][0]["mean"]:
        table.add_column(name, justify="right")
    for case in report["cases"]:
        table.add_row(case["case"], *(f"{value:.3f}" for value in case["mean"].values()))
    stdout.print(table)
    stdout.print(f"\nThe load wanders, {plans} plans in a row; then the traces that we ship, a plan every window:")
    for case in report["wandering"] + report["traces"]:
        sides = (f"{name} {case['time'][name]:.3f}, {case['bytes_moved'][name] / 1e9:,.1f} GB" for name in case["time"])
        stdout.print(f"{case['case']}: {'; '.join(sides)}", highlight=False)


@app.command("planner")
def planner_bench(as_json: AsJson = False) -> None:
    """How long a plan takes, from a small mesh to a thousand hosts.

    Example:

        expertmesh bench planner --json
    """
    from expertmesh.bench.planner import run

    with stderr.status("planning"):
        report = run()
    if as_json:
        _print_json(report)
        return
    table = Table(title="milliseconds, the least of several", title_style="", box=None, header_style="dim")
    for column in ("layers", "experts", "hosts", "first plan", "load drifted", "nothing changed"):
        table.add_column(column, justify="right")
    for row in report["sizes"]:
        sizes = (f"{row[name]:,}" for name in ("layers", "experts", "hosts"))
        table.add_row(*sizes, *(f"{row['milliseconds'][name]:.1f}" for name in ("first", "drifted", "unchanged")))
    stdout.print(table)


@app.command()
def decode(
    as_json: AsJson = False,
    shape: Annotated[Shape, typer.Option(help="Whose sizes the model has.")] = Shape.OLMOE,
    streams: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated. [default: 1, 8, 32]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the sides take turns.")] = 5,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each stream in a round.")] = 32,
    picture: Picture = None,
) -> None:
    """Tokens per second of a router and 2 hosts, beside transformers and llama.cpp on the same cores. Needs no mesh.

    Example:

        expertmesh bench decode --streams 1 --streams 32 --json
    """
    from expertmesh.bench.decode import run
    from expertmesh.bench.decode_picture import draw_decode
    from expertmesh.cli.console import steps_shown

    with steps_shown() as show:
        report = run(shape=shape.value, streams=streams or [1, 8, 32], rounds=rounds, tokens=tokens, report=show)
    if picture is not None:
        draw_decode(report, picture)
    if as_json:
        _print_json(report)
        return
    sides = list(report["threads"])
    table = Table(title=f"tokens per second: {report['shape']['model']}", title_style="", box=None, header_style="dim")
    for column in ("streams", *sides):
        table.add_column(column, justify="right")
    for row in report["streams"]:
        of = row["tokens_per_second"]
        cells = (f"{of[side]['median']:.1f} ({of[side]['p10']:.1f} to {of[side]['p90']:.1f})" for side in sides)
        table.add_row(str(row["streams"]), *cells)
    stdout.print(table)
    for row in report["streams"]:
        times = (f"{spread['median']:.2f} times {side}" for side, spread in row["ours_over"].items())
        stdout.print(f"At {row['streams']}: {', '.join(times)}.", highlight=False)
    for side, reason in report["left_out"].items():
        stdout.print(f"Without {side}: {reason}")


@app.command("gate")
def gate_bench(
    as_json: AsJson = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the gates take turns to be fast.")] = 5,
    windows: Annotated[int | None, typer.Option(min=1, help="Of the held-out text; all by default.")] = None,
    picture: Picture = None,
) -> None:
    """What other gates make of the tiny model: loss, expert rows for each token, and speed. Needs no mesh.

    Example:

        expertmesh bench gate --json
    """
    from expertmesh.bench import gate
    from expertmesh.bench.gate_picture import draw_gates

    with stderr.status(MEASURING) as status:
        report = gate.run(rounds=rounds, windows=windows, report=status.update)
    if picture is not None:
        draw_gates(report, picture)
    if as_json:
        _print_json(report)
        return
    title = f"{report['text']['tokens']:,} tokens that the tiny model has not seen"
    table = Table(title=title, title_style="", box=None, header_style="dim")
    for column in ("gate", "loss", "", "rows per token", "", "tokens/s", "over its own"):
        table.add_column(column, justify="left" if column == "gate" else "right")
    for name, of in report["gates"].items():
        pace, over = of["tokens_per_second"]["median"], of["pace_over_own"]
        table.add_row(
            f"{name} *" if of["depends_on_batch"] else name,
            f"{of['loss']:.4f}",
            f"{of['higher_loss']:+.2%}",
            f"{of['rows_per_token']:.3f}",
            f"{of['rows_over_own'] - 1:+.0%}",
            f"{pace:,.0f}",
            f"{over['median']:.2f} ({over['p10']:.2f} to {over['p90']:.2f})",
        )
    stdout.print(table)
    stdout.print("* an answer depends on what else is in the batch", highlight=False)
    wish, by = report["wish"], report["fulfilled_by"]
    asked = f"{wish['fewer_rows']:.0%} fewer rows for at most {wish['higher_loss']:.0%} more loss"
    stdout.print(f"{asked}: {'; '.join(by) or 'none of them'}.", highlight=False)


@app.command("kernel")
def kernel_bench(
    as_json: AsJson = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds in which the sides take turns.")] = 15,
    picture: Picture = None,
) -> None:
    """The experts of one layer, beside transformers' and a loop over them, and what the memory would allow.

    Example:

        expertmesh bench kernel --json
    """
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device: {device!r} is neither cpu nor cuda")
    if device == "cuda":
        if picture is not None:
            raise ConfigError("picture: only the figures of cpu are drawn")
        from expertmesh.bench import kernel_gpu

        with stderr.status(MEASURING):
            report = kernel_gpu.run(rounds=rounds)
        _print_json(report)
        return
    from expertmesh.bench import kernel

    with stderr.status(MEASURING):
        report = kernel.run(rounds=rounds)
    if picture is not None:
        kernel.draw(report, picture)
    if as_json:
        _print_json(report)
        return
    for of_shape in report["shapes"]:
        shape = of_shape["shape"]
        table = Table(
            title=f"{shape['experts']} experts of {shape['intermediate']:,}, hidden {shape['hidden']:,}, "
            f"top-{shape['top_k']}; {report['threads']} threads, {of_shape['arithmetic']}",
            title_style="",
            box=None,
            header_style="dim",
        )
        for column in ("tokens", "ms", "of the stream", "over"):
            table.add_column(column, justify="left" if column == "over" else "right")
        for at in of_shape["at"]:
            over = (f"{name} {of['median']:.1f}x" for name, of in at["times_as_fast_as"].items())
            milliseconds, share = at["milliseconds"][kernel.OURS]["median"], at["share_of_stream"]["median"]
            table.add_row(str(at["tokens"]), f"{milliseconds:.2f}", f"{share:.0%}", ", ".join(over))
        stdout.print(table)


def _print_json(report: dict[str, Any]) -> None:
    stdout.print_json(json.dumps(report))
