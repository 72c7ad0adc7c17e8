"""The command: makes the checks, and writes what they found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from loraplex.cli.doctor.finding import Finding, Verdict
from loraplex.cli.doctor.machine import check_machine
from loraplex.cli.doctor.server import check_server
from loraplex.cli.settings import open_client
from loraplex.cli.terminal import stdout, write

_STYLES = {Verdict.OK: "green", Verdict.NOTE: "yellow", Verdict.FAIL: "bold red"}


def doctor(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="The base model or adapter that has to be there.")
    ] = None,
    data_dir: Annotated[
        Path,
        typer.Option(help="Where a server here would keep adapters.", envvar="LORAPLEX_DATA_DIR"),
    ] = Path("~/.loraplex"),
    local_only: Annotated[
        bool, typer.Option("--local-only", help="Ask no server: check this machine alone.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the findings as JSON.")] = False,
) -> None:
    """Check this machine and the server; exit with 1 if something does not work."""
    findings = []
    for finding in _findings(ctx, model, data_dir.expanduser().absolute(), local_only):
        findings.append(finding)
        if not as_json:
            _write(finding)
    counts = Counter(finding.verdict for finding in findings)
    if as_json:
        write(stdout(), json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        told = ", ".join(f"{counts[verdict]} {verdict.lower()}" for verdict in Verdict)
        write(stdout(), f"\n{told}")
    if counts[Verdict.FAIL]:
        raise typer.Exit(1)


def _findings(
    ctx: typer.Context, model: str | None, data_dir: Path, local_only: bool
) -> Iterator[Finding]:
    yield from check_machine(data_dir)
    if not local_only:
        with open_client(ctx) as client:
            yield from check_server(client, model)


def _write(finding: Finding) -> None:
    console = stdout()
    write(console, f"{finding.verdict:<5}", style=_STYLES[finding.verdict], end="")
    write(console, f" {finding.subject:<12} {' '.join(finding.told.split())}")
    if finding.advice:
        write(console, f"{'':<19}-> {finding.advice}", style="dim")
