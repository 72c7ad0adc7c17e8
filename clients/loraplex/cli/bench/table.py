"""The figures of a run as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraplex.cli.bench.report import PERCENTILES
from loraplex.cli.terminal import stdout, write, write_table

_SPREADS = {
    "ttft_ms": "time to first token",
    "per_token_ms": "per token after it",
    "between_pieces_ms": "between pieces",
    "whole_ms": "whole answer",
    "sent_late_ms": "sent late by",
}
_MAX_MODELS = 20


def write_figures(told: Mapping[str, Any]) -> None:
    """Write the figures that `report.figures` found."""
    failed = sum(told["failed"].values())
    write(
        stdout(),
        f"{told['requests']} requests, {failed} failed, in {told['wall_s']:.1f} s: "
        f"{told['requests_per_s']:.2f} requests/s, {told['output_tokens_per_s']:.1f} tokens/s, "
        f"{told['prompt_tokens']} prompt and {told['output_tokens']} output tokens",
    )
    for kind, count in told["failed"].items():
        write(stdout(), f"  {count} x {kind}")
    columns = ("mean", *(f"p{percent}" for percent in PERCENTILES), "max")
    rows = [
        (label, *(f"{told[name][column]:.1f}" for column in columns))
        for name, label in _SPREADS.items()
        if told[name] is not None
    ]
    write(stdout(), "")
    write_table(("MS", *(column.upper() for column in columns)), rows)
    if len(told["by_model"]) > 1:
        _write_models(told)


def _write_models(told: Mapping[str, Any]) -> None:
    write(stdout(), "")
    shown = list(told["by_model"].items())[:_MAX_MODELS]
    rows = [
        (
            model,
            got["requests"],
            got["failed"],
            got["output_tokens"],
            *(f"{got['ttft_ms'][p]:.1f}" if got["ttft_ms"] else "-" for p in ("p50", "p99")),
        )
        for model, got in shown
    ]
    write_table(("MODEL", "REQUESTS", "FAILED", "TOKENS", "TTFT P50", "TTFT P99"), rows)
    if left := len(told["by_model"]) - len(shown):
        write(stdout(), f"... and {left} more, in the JSON below")
    if told["fairness"]:
        write(
            stdout(),
            f"fairness of waiting (Jain): {told['fairness']['jain_ttft']:.3f}; the worst model "
            f"waits {told['fairness']['worst_to_best_ttft']:.1f} times as long as the best",
        )
