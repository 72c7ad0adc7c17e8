"""`python -m loraplex_server.simulator EXPERIMENT`; also `loraplex simulate EXPERIMENT`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from loraplex_server.simulator.errors import SimulationError
from loraplex_server.simulator.experiments import custom
from loraplex_server.simulator.experiments.options import Options
from loraplex_server.simulator.experiments.registry import EXPERIMENTS
from loraplex_server.simulator.plots import save_all
from loraplex_server.simulator.report import Report

_ABOUT = (
    "Simulate the scheduler and the memory of an engine, or of a fleet, on devices that are not at "
    "hand. Same arguments and seed, same result."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one experiment; returns the exit code: 0 done, 1 failed, 2 asked wrongly."""
    asked = _parser().parse_args(argv)
    if asked.list or asked.experiment is None:
        sys.stdout.write(_listing())
        return 0
    try:
        report = _run(asked)
        if asked.plots is not None:
            for path in save_all(report.plots, asked.plots):
                sys.stderr.write(f"  wrote {path}\n")
    except SimulationError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130
    sys.stdout.write(report.text() + "\n")
    if asked.json:
        sys.stdout.write(report.json_line() + "\n")
    return 0


def _run(asked: argparse.Namespace) -> Report:
    options = Options(seed=asked.seed, is_quick=asked.quick, has_progress=not asked.quiet)
    if asked.experiment == "run":
        return custom.run(options, asked)
    return EXPERIMENTS[asked.experiment].run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loraplex simulate", description=_ABOUT)
    parser.add_argument("--list", action="store_true", help="name all experiments and end")
    commands = parser.add_subparsers(dest="experiment", metavar="EXPERIMENT")
    for experiment in EXPERIMENTS.values():
        command = commands.add_parser(
            experiment.name, help=experiment.about, description=experiment.about
        )
        _add_common(command)
    command = commands.add_parser("run", help="one run of your own", description=custom.__doc__)
    _add_common(command)
    custom.add_arguments(command)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, default=42, help="of the workload (42)")
    command.add_argument("--quick", action="store_true", help="shorter, for a first look")
    command.add_argument("--quiet", action="store_true", help="do not tell what is simulated now")
    command.add_argument("--json", action="store_true", help="end with one line of JSON")
    command.add_argument("--plots", type=Path, metavar="DIR", help="draw the figures into DIR")


def _listing() -> str:
    names = {e.name: f"{e.about} (about {e.minutes:g} min)" for e in EXPERIMENTS.values()}
    names["run"] = "one run of your own: see `loraplex simulate run --help`"
    lines = [f"  {name:<12}{about}" for name, about in names.items()]
    return "\n".join(["Experiments, for `loraplex simulate EXPERIMENT`:", *lines, ""])


if __name__ == "__main__":
    sys.exit(main())
