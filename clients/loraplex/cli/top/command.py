"""The command: reads the server again and again, and shows what came."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.live import Live

from loraplex.cli.problems import explain
from loraplex.cli.settings import open_client
from loraplex.cli.terminal import stdout, write
from loraplex.cli.top.reading import History, Reading, Window, summary
from loraplex.cli.top.view import Notice, render
from loraplex.client import Client
from loraplex.errors import LoraplexError, UsageError

_TIMEOUT_S = 5.0


def top(
    ctx: typer.Context,
    interval: Annotated[
        float, typer.Option(min=0.2, help="Seconds between readings.", metavar="S")
    ] = 2.0,
    span: Annotated[
        float, typer.Option(min=0.2, help="Rates and percentiles are of so long.", metavar="S")
    ] = 10.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one view, of one interval, and leave.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --once: write the numbers as JSON.")
    ] = False,
) -> None:
    """Watch the pool, the adapters and the requests; Ctrl-C leaves."""
    if as_json and not once:
        raise UsageError("--json writes one reading: give --once too")
    with open_client(ctx) as shared:
        client = shared.with_options(timeout=_TIMEOUT_S, max_retries=0)
        if once:
            _show_once(client, interval, as_json)
            return
        if not stdout().is_terminal:
            raise UsageError("this is no terminal to draw on: `loraplex top --once` prints a view")
        Watch(client, History(span), stdout()).run(interval)


def read(client: Client) -> Reading:
    """Ask the server how it does."""
    metrics, pool = client.metrics(), client.pool()
    return Reading(time.monotonic(), metrics, pool)


def _show_once(client: Client, interval: float, as_json: bool) -> None:
    first = read(client)
    time.sleep(interval)
    window = Window(first, read(client))
    if as_json:
        write(stdout(), json.dumps(summary(window)))
        return
    console = stdout()
    view = render(window, _notice(client, window), columns=console.width, lines=None)
    console.print(view)


def _notice(client: Client, window: Window) -> Notice:
    is_ready = window.end.gauge("loraplex_engine_ready")
    return Notice(client.base_url, "ready" if is_ready else "the engine is not ready")


class Watch:
    """The live view. Owned by the terminal's thread; a server that goes away may come back."""

    def __init__(self, client: Client, history: History, console: Console) -> None:
        self._client = client
        self._history = history
        self._console = console
        self._window: Window | None = None

    def run(self, interval: float) -> None:
        """Show the server until Ctrl-C."""
        try:
            with Live(console=self._console, screen=True, auto_refresh=False) as live:
                while True:
                    live.update(self.next_view(), refresh=True)
                    time.sleep(interval)
        except KeyboardInterrupt:
            return

    def next_view(self) -> RenderableType:
        """Read the server and return what to show: the last numbers, if it does not answer."""
        try:
            self._window = self._history.add(read(self._client))
            notice = _notice(self._client, self._window)
        except LoraplexError as error:
            problem = f"{explain(error)}; trying again"
            if self._window is None:
                return problem
            notice = Notice(self._client.base_url, "the numbers are old", problem)
        size = self._console.size
        return render(self._window, notice, columns=size.width, lines=size.height)
