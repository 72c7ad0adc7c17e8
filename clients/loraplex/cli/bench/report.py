"""Figures of a run, from the outcomes of its requests. Pure.

Times to first token and whole times count from when a request was due, as `load` has it. A request
that failed counts as failed, and in no other figure. Percentiles are of the nearest rank.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from loraplex.cli.bench.load import Outcome

PERCENTILES = (50, 90, 95, 99)


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return all figures of a run; times are in milliseconds."""
    done = [outcome for outcome in outcomes if not outcome.error]
    wall_s = max((outcome.end_s for outcome in outcomes), default=0.0)
    num_output = sum(outcome.num_output for outcome in done)
    return {
        "requests": len(outcomes),
        "failed": dict(Counter(outcome.error for outcome in outcomes if outcome.error)),
        "wall_s": round(wall_s, 3),
        "requests_per_s": _per(len(done), wall_s),
        "output_tokens_per_s": _per(num_output, wall_s),
        "prompt_tokens": sum(outcome.num_prompt for outcome in done),
        "output_tokens": num_output,
        "ttft_ms": spread([ttft_s(outcome) for outcome in done]),
        "per_token_ms": spread([t for o in done if (t := per_token_s(o)) is not None]),
        "between_pieces_ms": spread([gap for outcome in done for gap in outcome.gaps_s]),
        "whole_ms": spread([outcome.end_s - outcome.due_s for outcome in done]),
        "sent_late_ms": spread([outcome.sent_s - outcome.due_s for outcome in outcomes]),
        "by_model": by_model(outcomes),
        "fairness": fairness(done),
    }


def ttft_s(outcome: Outcome) -> float:
    """Return the seconds from when it was due to its first token, or to its end without one."""
    first_s = outcome.end_s if outcome.first_s is None else outcome.first_s
    return first_s - outcome.due_s


def per_token_s(outcome: Outcome) -> float | None:
    """Return the seconds for each token after the first, None where there is none."""
    if outcome.first_s is None or outcome.num_output < 2:
        return None
    return (outcome.end_s - outcome.first_s) / (outcome.num_output - 1)


def spread(values_s: Sequence[float]) -> dict[str, float] | None:
    """Return mean, percentiles and maximum in milliseconds, None of nothing."""
    if not values_s:
        return None
    ranked = sorted(values_s)
    found = {"mean": sum(ranked) / len(ranked)}
    for percent in PERCENTILES:
        found[f"p{percent}"] = ranked[math.ceil(percent / 100 * len(ranked)) - 1]
    found["max"] = ranked[-1]
    return {name: round(1000 * value, 3) for name, value in found.items()}


def by_model(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Return what each model got, the busiest first."""
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.ask.model].append(outcome)
    told = {}
    for model, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        done = [outcome for outcome in group if not outcome.error]
        told[model] = {
            "requests": len(group),
            "failed": len(group) - len(done),
            "output_tokens": sum(outcome.num_output for outcome in done),
            "ttft_ms": spread([ttft_s(outcome) for outcome in done]),
        }
    return told


def fairness(done: Sequence[Outcome]) -> dict[str, float] | None:
    """Return Jain's index of what models wait: 1 if all alike, 1/n if one waits for all.

    R. Jain et al., "A Quantitative Measure of Fairness", 1984: (sum x)^2 / (n sum x^2), of the
    mean times to first token. None with fewer than two models.
    """
    waits: dict[str, list[float]] = defaultdict(list)
    for outcome in done:
        waits[outcome.ask.model].append(ttft_s(outcome))
    means = [sum(values) / len(values) for values in waits.values()]
    squares = sum(mean * mean for mean in means)
    if len(means) < 2 or not squares:
        return None
    return {
        "models": len(means),
        "jain_ttft": round(sum(means) ** 2 / (len(means) * squares), 4),
        "worst_to_best_ttft": round(max(means) / max(min(means), 1e-9), 3),
    }


def _per(count: int, wall_s: float) -> float:
    return round(count / wall_s, 3) if wall_s else 0.0
