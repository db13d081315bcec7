"""`expertmesh trace`: record which experts fire, make up such loads, simulate the control plane on them, replay."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from expertmesh.cli.console import stderr, stdout
from expertmesh.cli.options import AsJson
from expertmesh.cli.trace_report import print_replay, print_simulation
from expertmesh.client import DEFAULT_URL, fetch
from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.credentials import shared_token
from expertmesh.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expertmesh.trace.format import TraceDecoder

app = typer.Typer(help="Record, make up, simulate and replay which experts fire over time.", no_args_is_help=True)

Output = Annotated[Path, typer.Option("--output", "-o", help="The file to write.")]
TraceFile = Annotated[Path, typer.Argument(metavar="TRACE", help="A trace file.")]
Address = Annotated[str, typer.Option(help="Where the mesh's gateway listens.")]


@app.command()
def record(
    output: Output,
    seconds: Annotated[float, typer.Option(help="For how long.")] = 60,
    address: Address = DEFAULT_URL,
) -> None:
    """Record the routing of a running mesh: which experts every token chose, and when. Ctrl-C ends it early.

    Example:

        expertmesh trace record --address http://127.0.0.1:8000 --seconds 60 -o morning.trace
    """
    from expertmesh.trace.client import record as save
    from expertmesh.trace.format import TraceDecoder

    decoder = TraceDecoder(address)
    with stderr.status("recording") as status, contextlib.suppress(KeyboardInterrupt):

        def show(decoder: TraceDecoder) -> None:
            status.update(f"recording: {decoder.num_records:,} exchanges")

        save(address, seconds, output, decoder, show)
    header = decoder.finish()
    left_out = f", {decoder.num_dropped:,} left out" if decoder.num_dropped else ""
    stdout.print(f"{output}: {decoder.num_records:,} exchanges of {header.model}{left_out}", highlight=False)


@app.command()
def make(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="zipf, drift, bursts, diurnal or topics.")],
    output: Output,
    layers: Annotated[int, typer.Option(help="MoE layers.")] = 61,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 256,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 8,
    windows: Annotated[int, typer.Option(help="How many windows.")] = 360,
    window_s: Annotated[float, typer.Option("--window", help="Seconds of one window.")] = 10.0,
    rate: Annotated[float, typer.Option(help="Tokens per second.")] = 2000.0,
    skew: Annotated[float, typer.Option(help="Exponent of the Zipf law; 0 makes all experts alike.")] = 1.0,
    pace: Annotated[float | None, typer.Option(help="In how many seconds it changes. (By default the kind's.)")] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal traces.")] = 0,
) -> None:
    """Make up a load. zipf stands still; in drift, ranks walk; bursts, diurnal and topics say what they do.

    Example:

        expertmesh trace make drift -o drift.trace --experts 64 --layers 16 --windows 720
    """
    from expertmesh.trace.synthetic import SyntheticOptions, write_trace

    options = SyntheticOptions(
        kind=kind,  # type: ignore[arg-type]  # checked by the options
        layers=layers,
        experts=experts,
        top_k=top_k,
        windows=windows,
        window_s=window_s,
        tokens_per_s=rate,
        skew=skew,
        pace_s=pace,
        seed=seed,
    )
    with _progress("making", windows + 1) as step:
        try:
            with output.open("wb") as file:
                for piece in write_trace(options):
                    file.write(piece)
                    step()
        except OSError as error:
            raise ConfigError(f"output: {output}: {error.strerror or error}") from error
    hours = windows * window_s / 3600
    stdout.print(f"{output}: {hours:.3g} h of {layers} x {experts} experts, {kind}", highlight=False)


@app.command()
def simulate(
    trace: TraceFile,
    as_json: AsJson = False,
    inventory: Annotated[
        Path | None, typer.Option(help='Hosts as for `expertmesh plan`: {"hosts": [{"host", "slots", "rate"}, ...]}.')
    ] = None,
    hosts: Annotated[int, typer.Option(help="How many hosts, without --inventory.")] = 16,
    slots: Annotated[int | None, typer.Option(help="Slots of each. (By default a quarter more than experts.)")] = None,
    launch_ms: Annotated[float, typer.Option(help="What a launch costs, whatever is in it.")] = 0.1,
    expert_us: Annotated[float, typer.Option(help="What each distinct expert in it costs.")] = 40.0,
    row_us: Annotated[float, typer.Option(help="What each row in it costs.")] = 2.0,
    slow: Annotated[float, typer.Option(help="This part of the hosts takes twice as long.")] = 0.0,
    window_s: Annotated[float, typer.Option("--window", help="Seconds that are judged together.")] = 10.0,
    plan_every: Annotated[float, typer.Option(help="Seconds between plans.")] = 60.0,
    half_life: Annotated[float, typer.Option(help="Seconds after which load counts half.")] = 30.0,
    batch: Annotated[int, typer.Option(help="Tokens of one exchange.")] = 512,
    replica_mb: Annotated[float, typer.Option(help="Size of one replica.")] = 44.0,
    copy_mb_s: Annotated[float, typer.Option(help="How fast a host loads replicas.")] = 1000.0,
    sample_layers: Annotated[int, typer.Option(help="Layers judged in each window, in turn.")] = 8,
    seed: Annotated[int, typer.Option(help="For the exchanges that are drawn.")] = 0,
    picture: Annotated[Path | None, typer.Option(help="Draw it into this file, .svg or .png.")] = None,
) -> None:
    """Run the production planner over a trace, on hosts that are only modelled, and compare it with standing still.

    Example:

        expertmesh trace simulate drift.trace --hosts 32 --slow 0.5 --picture drift.svg
    """
    from expertmesh.placement import TimeModel
    from expertmesh.trace.fleet import inventory_hosts, model_fleet
    from expertmesh.trace.format import TraceReader
    from expertmesh.trace.simulate import SimulationOptions
    from expertmesh.trace.simulate import simulate as run

    reader = TraceReader(trace)
    options = SimulationOptions(
        window_s=window_s,
        plan_every_s=plan_every,
        half_life_s=half_life,
        batch_tokens=batch,
        replica_bytes=round(replica_mb * 1e6),
        copy_bytes_per_s=copy_mb_s * 1e6,
        sample_layers=sample_layers,
        seed=seed,
    )
    if inventory is not None:
        fleet = inventory_hosts(inventory)
    else:
        model = TimeModel(launch_s=launch_ms / 1e3, row_s=row_us / 1e6, expert_s=expert_us / 1e6)
        fleet = model_fleet(reader.header, hosts, slots, model, slow)
    with _progress("simulating", None) as step:
        result = run(reader.header, reader, fleet, options, SYSTEM_CLOCK, lambda _: step())
    if picture is not None:
        from expertmesh.bench.picture import draw_simulation

        draw_simulation(result, picture)
    if as_json:
        stdout.print_json(json.dumps(result))
        return
    print_simulation(result)


@app.command()
def replay(
    trace: TraceFile,
    address: Address = DEFAULT_URL,
    as_json: AsJson = False,
    speed: Annotated[float, typer.Option(help="Seconds of the trace in one; `inf` sends without waiting.")] = 1.0,
    tokens: Annotated[int, typer.Option(help="Of a trace of rows: tokens of the exchange for one window.")] = 128,
    seed: Annotated[int, typer.Option(help="For the rows, and what else is drawn.")] = 0,
) -> None:
    """Send a trace's routing to a running mesh's hosts, with random rows.

    Ends with exit code 1 when an exchange failed.

    Example:

        expertmesh trace replay morning.trace --address http://127.0.0.1:8000 --speed 2
    """
    from expertmesh.attachment import Attachment, look_up
    from expertmesh.moe.exchange import Exchange
    from expertmesh.trace.format import TraceReader
    from expertmesh.trace.replay import CountingTransport, ReplayOptions
    from expertmesh.trace.replay import replay as run
    from expertmesh.transport.network import NetworkTransport

    reader = TraceReader(trace)
    token = shared_token()
    served = look_up(address)
    model = fetch(address, "/v1/models")["data"][0]
    reader.header.check_fits(
        num_experts=served.placement.num_experts,
        fingerprint=model.get("fingerprint", ""),
        of=f"the mesh at {address}",
    )
    options = ReplayOptions(
        hidden=served.hidden,
        dtype=served.dtype,
        top_k=reader.header.top_k,
        speed=speed,
        window_tokens=tokens,
        seed=seed,
    )
    transport = CountingTransport(NetworkTransport(token))
    exchange = Exchange(transport, served.placement)
    with Attachment(exchange, address), _progress("replaying", None) as step:
        result = run(reader, exchange, options, SYSTEM_CLOCK, threading.Event().wait, step)
    result["rows"] = dict(sorted(transport.rows.items()))
    if as_json:
        stdout.print_json(json.dumps(result))
    else:
        print_replay(result)
    if result["failures"]:
        raise typer.Exit(1)


@contextlib.contextmanager
def _progress(what: str, total: int | None) -> Iterator[Any]:
    """A progress line; what is yielded moves it on by one."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.completed}"))
    with Progress(*columns, TimeElapsedColumn(), console=stderr, transient=True) as bars:
        task = bars.add_task(what, total=total)
        yield lambda: bars.advance(task)
