"""The figures of a run as one picture. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex.cli.bench.load import Outcome
from loraplex.cli.bench.report import per_token_s, ttft_s
from loraplex.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_plotting(path: Path) -> None:
    """See, before an hour of load, that there will be a picture.

    Raises:
        UsageError: matplotlib is not installed, or the folder is not there.
    """
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ModuleNotFoundError as error:
        raise UsageError("--plot needs matplotlib: pip install matplotlib") from error
    if not path.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {path.absolute().parent} for --plot")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot writes .png, .svg or .pdf, not {path.name!r}")


def plot(outcomes: Sequence[Outcome], path: Path, title: str) -> None:
    """Write the picture: two distributions, and the run as it went."""
    from matplotlib.figure import Figure

    done = [outcome for outcome in outcomes if not outcome.error]
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    axes: list[Axes] = list(figure.subplots(2, 2).flat)
    _distribution(axes[0], [ttft_s(outcome) for outcome in done], "time to first token (s)")
    rates = [t for outcome in done if (t := per_token_s(outcome)) is not None]
    _distribution(axes[1], rates, "time per token after it (s)")
    axes[2].scatter([o.due_s for o in done], [ttft_s(o) for o in done], s=6)
    axes[2].set(xlabel="due at (s)", ylabel="time to first token (s)", ylim=(0, None))
    times, counts = _in_flight(outcomes)
    axes[3].step(times, counts, where="post")
    axes[3].set(xlabel="time (s)", ylabel="requests under way", ylim=(0, None))
    for ax in axes:
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _distribution(ax: Axes, values: list[float], label: str) -> None:
    ranked = sorted(values)
    shares = [(index + 1) / len(ranked) for index in range(len(ranked))]
    ax.step(ranked, shares, where="post")
    ax.set(xlabel=label, ylabel="share of requests", ylim=(0, 1))


def _in_flight(outcomes: Sequence[Outcome]) -> tuple[list[float], list[int]]:
    changes = sorted([(o.sent_s, 1) for o in outcomes] + [(o.end_s, -1) for o in outcomes])
    times, counts, count = [0.0], [0], 0
    for at_s, change in changes:
        count += change
        times.append(at_s)
        counts.append(count)
    return times, counts
