"""The command: options to a plan, a plan to a run, a run to figures."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import islice, takewhile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loraplex.async_client import AsyncClient
from loraplex.cli.bench.load import LoadGenerator, Outcome, measure_prompts
from loraplex.cli.bench.plan import Ask, Lengths, Popularity, arrival_times, drawn_asks
from loraplex.cli.bench.plot import check_plotting, plot
from loraplex.cli.bench.report import figures
from loraplex.cli.bench.table import write_figures
from loraplex.cli.bench.trace import read_trace
from loraplex.cli.models import pick_model
from loraplex.cli.settings import Settings, settings_of
from loraplex.cli.terminal import stderr, stdout, write
from loraplex.client import Client
from loraplex.errors import UsageError
from loraplex.version import installed_version

#: Above this share of one core the generator's own work shows in the times it measures.
_BUSY_SHARE = 0.8
_REQUESTS = 100


@dataclass(frozen=True)
class Options:
    """What the command line asks for. `rate` and `trace` are of open loops."""

    models: tuple[str, ...]
    requests: int | None
    duration: float | None
    concurrency: int
    rate: float | None
    cv: float
    trace: str | None
    speed: float
    zipf: float
    input_len: str
    output_len: str
    warmup: int
    timeout: float
    seed: int


def bench(
    ctx: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A name, or a pattern such as 'customer-*'; can be given again."),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="How many, at most; 100 unless --duration or --trace end it."),
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=0.1, help="No request after so long.", metavar="S")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Closed loop: so many ask, each again when answered.")
    ] = 8,
    rate: Annotated[
        float | None,
        typer.Option(min=0.001, help="Open loop: so many arrive per second, answered or not."),
    ] = None,
    cv: Annotated[
        float, typer.Option(min=0.0, help="Of the gaps between arrivals; 1: Poisson, 0: steady.")
    ] = 1.0,
    trace: Annotated[
        Path | None, typer.Option(help="Open loop: play a .csv or .jsonl of real traffic.")
    ] = None,
    speed: Annotated[
        float, typer.Option(min=0.001, help="So many times as fast as the trace was.")
    ] = 1.0,
    zipf: Annotated[
        float, typer.Option(min=0.0, help="Exponent of the models' popularity; 0: all alike.")
    ] = 0.0,
    input_len: Annotated[
        str, typer.Option(help="Tokens of prompts: a number, or a range such as 64-256.")
    ] = "128",
    output_len: Annotated[str, typer.Option(help="Tokens of answers, likewise.")] = "64",
    warmup: Annotated[int, typer.Option(min=0, help="Requests before, which do not count.")] = 4,
    timeout: Annotated[float, typer.Option(min=1.0, help="Of one request.", metavar="S")] = 600.0,
    seed: Annotated[int, typer.Option(help="The same seed makes the same requests.")] = 0,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Write a picture; needs matplotlib.")
    ] = None,
) -> None:
    """Put load on the server and measure it; writes a table, and one line of JSON last."""
    if rate is not None and trace is not None:
        raise UsageError("a trace has its own arrivals: give --rate or --trace; --speed hurries it")
    if plot_file is not None:
        check_plotting(plot_file)
    if requests is None and duration is None and trace is None:
        requests = _REQUESTS
    settings = settings_of(ctx)
    options = Options(
        models=_chosen_models(settings, model or []),
        requests=requests,
        duration=duration,
        concurrency=concurrency,
        rate=rate,
        cv=cv,
        trace=None if trace is None else str(trace),
        speed=speed,
        zipf=zipf,
        input_len=input_len,
        output_len=output_len,
        warmup=warmup,
        timeout=timeout,
        seed=seed,
    )
    asks = list(plan(options)) if is_open(options) else plan(options)
    outcomes, busy = asyncio.run(_run(settings, options, asks))
    _tell(settings, options, outcomes, busy)
    if plot_file is not None:
        plot(outcomes, plot_file, _title(options))
    if all(outcome.error for outcome in outcomes):
        raise typer.Exit(1)


def is_open(options: Options) -> bool:
    """Whether requests come when they are due, and not when others were answered."""
    return options.rate is not None or options.trace is not None


def plan(options: Options) -> Iterator[Ask]:
    """Return the requests of a run."""
    rng = random.Random(options.seed)
    popularity = Popularity(options.models, options.zipf)
    if options.trace is not None:
        asks = iter(read_trace(Path(options.trace), popularity, options.speed, rng))
    else:
        times = None if options.rate is None else arrival_times(options.rate, options.cv, rng)
        lengths = Lengths.parse(options.input_len), Lengths.parse(options.output_len)
        asks = drawn_asks(popularity, *lengths, times, rng)
    end_s = math.inf if options.duration is None else options.duration
    return takewhile(lambda ask: (ask.at_s or 0.0) <= end_s, islice(asks, options.requests))


def _chosen_models(settings: Settings, patterns: list[str]) -> tuple[str, ...]:
    """Return the models that names and patterns mean, in the server's order."""
    with settings.client() as client:
        if not patterns:
            return (pick_model(client, None),)
        chosen: dict[str, None] = {}
        for pattern in patterns:
            chosen.update(dict.fromkeys(_matches(client, pattern)))
        return tuple(chosen)


def _matches(client: Client, pattern: str) -> list[str]:
    if not set(pattern) & set("*?["):
        return [pick_model(client, pattern)]
    found = [model.id for model in client.models.list() if fnmatchcase(model.id, pattern)]
    if not found:
        raise UsageError(f"no model is like {pattern!r}; `loraplex models` lists them")
    return found


async def _run(
    settings: Settings, options: Options, asks: Iterator[Ask] | list[Ask]
) -> tuple[list[Outcome], float]:
    """Return the outcomes, and the share of one core that making them took here."""
    async with settings.async_client(options.timeout) as client:
        prompts = await measure_prompts(client, options.models[0])
        await _warm_up(client, options)
        with _progress() as progress:
            total = len(asks) if isinstance(asks, list) else options.requests
            task = progress.add_task("requests", total=total)
            load = LoadGenerator(
                client, prompts, options.seed, lambda outcome: progress.advance(task)
            )
            began, cpu = time.perf_counter(), time.process_time()
            if isinstance(asks, list):
                outcomes = await load.run_open(asks)
            else:
                asks = _until(asks, options.duration)
                outcomes = await load.run_closed(asks, options.concurrency)
            wall_s = time.perf_counter() - began
            return outcomes, (time.process_time() - cpu) / max(wall_s, 1e-9)


async def _warm_up(client: AsyncClient, options: Options) -> None:
    """Make requests that do not count; the first error ends the run, and says what is wrong."""
    for index in range(options.warmup):
        model = options.models[index % len(options.models)]
        await client.completions.create(model=model, prompt="warm up", max_tokens=4)


def _until(asks: Iterator[Ask], duration: float | None) -> Iterator[Ask]:
    end_s = None if duration is None else time.monotonic() + duration
    for ask in asks:
        if end_s is not None and time.monotonic() > end_s:
            return
        yield ask


def _progress() -> Progress:
    console = stderr()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _tell(settings: Settings, options: Options, outcomes: list[Outcome], busy: float) -> None:
    told: dict[str, Any] = figures(outcomes)
    write(stdout(), _title(options))
    write_figures(told)
    if busy > _BUSY_SHARE:
        write(
            stderr(),
            f"this load generator was busy {busy:.0%} of the time: its own work is in these times; "
            "run several of them, or ask for less",
            style="yellow",
        )
    about = {"version": installed_version(), "base_url": settings.base_url, **asdict(options)}
    write(stdout(), json.dumps({**told, "generator_busy": round(busy, 3), "options": about}))


def _title(options: Options) -> str:
    num = len(options.models)
    models = options.models[0] if num == 1 else f"{num} models, Zipf {options.zipf:g}"
    if options.trace is not None:
        how = f"the trace {Path(options.trace).name} at {options.speed:g} times its speed"
    elif options.rate is not None:
        how = f"open loop, {options.rate:g} requests/s, cv {options.cv:g}"
    else:
        how = f"closed loop, {options.concurrency} at a time"
    return f"{models}: {how}"
