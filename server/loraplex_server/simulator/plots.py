"""Figures of experiments. matplotlib is imported when one is drawn: it is an optional extra."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex_server.simulator.errors import SimulationError
from loraplex_server.simulator.fairness import ServiceGap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Colours that stay apart in print and for the colour-blind (Okabe and Ito).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def save_all(plots: Mapping[str, Callable[[], Figure]], folder: Path) -> list[Path]:
    """Draw every figure into the folder and return the files.

    Raises:
        SimulationError: matplotlib is not installed, or the folder cannot be written.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise SimulationError(
            "plots need matplotlib: pip install 'loraplex[simulate]', or leave --plots out"
        ) from error
    written = []
    # The same figures give the same bytes: no date, and ids that do not depend on the run.
    with mpl.rc_context({"svg.hashsalt": "loraplex", "svg.fonttype": "path", "font.size": 9}):
        for name, draw in plots.items():
            path = folder / name
            try:
                folder.mkdir(parents=True, exist_ok=True)
                draw().savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
            except OSError as error:
                raise SimulationError(f"cannot write {path}: {error}") from error
            written.append(path)
    return written


def panels_figure(
    panels: Sequence[tuple[str, str, Series]],
    *,
    x_label: str,
    is_log_x: bool = True,
    is_log_y: bool = False,
    title: str = "",
) -> Callable[[], Figure]:
    """Return what draws one panel per (title, y label, series by name), in one row."""

    def draw() -> Figure:
        figure, axes = _subplots(len(panels))
        for axis, (panel_title, y_label, series) in zip(axes, panels, strict=True):
            for index, (name, (x, y)) in enumerate(series.items()):
                axis.plot(x, y, marker="o", markersize=3.5, label=name, color=_color(index))
            if is_log_x:
                axis.set_xscale("log")
                axis.xaxis.set_minor_formatter(lambda value, place: "")
            axis.set(title=panel_title, xlabel=x_label, ylabel=y_label)
            if is_log_y:
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
            axis.grid(visible=True, alpha=0.3)
        _legend_below(figure, axes[0])
        figure.suptitle(title)
        return figure

    return draw


def bars_figure(
    panels: Sequence[tuple[str, str, Mapping[str, float]]],
) -> Callable[[], Figure]:
    """Return what draws one panel of bars per (title, x label, value by name), in one row."""

    def draw() -> Figure:
        figure, axes = _subplots(len(panels))
        for axis, (panel_title, x_label, values) in zip(axes, panels, strict=True):
            names = list(values)
            colors = [_color(index) for index in range(len(names))]
            axis.barh(names, list(values.values()), color=colors)
            axis.invert_yaxis()
            axis.set(title=panel_title, xlabel=x_label)
            axis.grid(visible=True, axis="x", alpha=0.3)
            if axis is not axes[0]:
                axis.set_yticklabels([])
        return figure

    return draw


def gap_figure(title: str, gaps: Mapping[str, ServiceGap]) -> Callable[[], Figure]:
    """Return what draws each tenant's service over time, one panel per order of service."""

    def draw() -> Figure:
        figure, axes = _subplots(len(gaps))
        for axis, (order, gap) in zip(axes, gaps.items(), strict=True):
            for tenant, service in enumerate(gap.service):
                axis.plot(gap.tick_s, service, label=f"client {tenant + 1}", color=_color(tenant))
            axis.plot(gap.tick_s, gap.gap, "--", color="black", label="gap")
            axis.set(title=order, xlabel="time, s", ylabel="service, tokens/s")
            axis.set_ylim(bottom=0)
            axis.grid(visible=True, alpha=0.3)
        _legend_below(figure, axes[0])
        figure.suptitle(title)
        return figure

    return draw


def _subplots(num: int) -> tuple[Figure, list[Any]]:
    """Return a figure of axes side by side; without pyplot, which keeps state of its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.3 * num, 3.1), layout="constrained")
    return figure, list(figure.subplots(1, num, squeeze=False)[0])


def _legend_below(figure: Figure, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]
