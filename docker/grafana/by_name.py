"""The panels that adapters and tenants have alike."""

from __future__ import annotations

from dashboard import Panel
from queries import one, total


def by_name(what: str, labels: str) -> tuple[Panel, ...]:
    """Return the panels that adapters and tenants have alike."""
    series = f"loraplex_{what}"
    legend = f"{{{{{what}}}}}"

    def named(column: str) -> str:
        return total(f"{series}_{column}_total", what, labels)

    return (
        Panel(
            "Requests",
            f"Sequences by {what}; `other` is all that have no series of their own.",
            "reqps",
            one(named("requests"), legend),
            is_stacked=True,
        ),
        Panel(
            "Tokens generated",
            f"By {what}.",
            "short",
            one(named("generated_tokens"), legend),
            is_stacked=True,
        ),
        Panel(
            "Prompt tokens",
            f"By {what}, each prompt once.",
            "short",
            one(named("prompt_tokens"), legend),
            is_stacked=True,
        ),
        Panel(
            "Time to first token (mean)",
            f"By {what}. One that stands out waits for its adapter, or has longer prompts.",
            "s",
            one(f"{named('ttft_seconds')} / ({named('first_tokens')} > 0)", legend),
            (2.5,),
        ),
        Panel(
            "Errors",
            "Share of sequences that failed, timed out, were refused or shed.",
            "percentunit",
            one(f"{named('errors')} / ({named('requests')} > 0)", legend),
            (0.01, 0.1),
        ),
        Panel(
            "Share of tokens, last hour",
            "Who uses it.",
            "short",
            one(
                f"topk(10, sum by ({what}) "
                f"(increase({series}_generated_tokens_total{{{labels}}}[1h])))",
                legend,
            ),
            kind="bargauge",
        ),
    )
