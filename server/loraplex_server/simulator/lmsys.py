"""The LMSYS Chatbot Arena workload of S-LoRA, section 7.3: from the user's copy of the log, or
drawn to match it (the log cannot be shipped).

Single-turn conversations, one adapter per base model named in the log, time stamps rescaled to the
asked-for duration. Where S-LoRA's reading is buggy (a list changed while iterated over, unseeded
choices) this one is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from loraplex_server.simulator.errors import SimulationError
from loraplex_server.simulator.trace import Trace
from loraplex_server.simulator.workloads import Lengths, zipf_shares

#: About 26 adapters, 85 tokens in and 165 out on average.
NUM_MODELS = 26
_LENGTHS = (
    Lengths(median=44, sigma=1.15, most=1023),
    Lengths(median=100, sigma=1.0, most=1023),
)
#: For VTC's sample of the log: it kept an engine of 777 tokens/s overloaded at 3.5 requests/s,
#: which S-LoRA's lengths would hardly do. 136 in and 256 out is assumed; its artifact has no log.
VTC_LENGTHS = (
    Lengths(median=71, sigma=1.15, most=1023),
    Lengths(median=165, sigma=1.0, most=1023),
)
#: Characters per token, where the log has text and no counts.
_CHARS_PER_TOKEN = 4


def matched_trace(
    *,
    rate: float,
    duration_s: float,
    zipf_s: float = 1.7,
    cv: float = 1.6,
    lengths: tuple[Lengths, Lengths] = _LENGTHS,
    seed: int = 42,
) -> Trace:
    """Return a workload drawn to match the log: adapters, skew, lengths and bursts.

    With an exponent of 1.7 the first of 26 gets half of all, as vicuna-13b does in LMSYS-Chat-1M.
    """
    rng = np.random.default_rng(seed)
    num = int(rate * duration_s)
    shares = zipf_shares(NUM_MODELS, zipf_s)
    adapter = rng.choice(NUM_MODELS, num, p=shares)
    arrival = np.cumsum(rng.gamma(1 / cv**2, cv**2, num))
    return Trace(
        name=f"lmsys-like R={rate:g}",
        arrival_s=arrival * duration_s / arrival[-1],
        adapter=adapter,
        prompt_len=lengths[0].draw(rng, num),
        output_len=lengths[1].draw(rng, num),
        num_adapters=NUM_MODELS,
        rate=rate,
        duration_s=duration_s,
        tenant=adapter,
    )


def load_trace(
    path: Path, *, rate: float, duration_s: float, most_tokens: int = 1024, seed: int = 42
) -> Trace:
    """Return the workload of a log: JSON lines with `model`, `tstamp` and `conversation`.

    A conversation is a list of messages with `role` and `content`; only those of one question and
    one answer are kept. Lengths are four characters per token, unless a line has `prompt_len` and
    `output_len`.

    Raises:
        SimulationError: the file cannot be read, or has too few conversations that fit.
    """
    turns = [turn for turn in map(_single_turn, _lines(path)) if turn is not None]
    rng = np.random.default_rng(seed)
    wanted = int(rate * duration_s)
    sample = rng.permutation(len(turns))[: 2 * wanted]
    fitting = [turns[i] for i in sample if turns[i][1] < most_tokens and turns[i][2] < most_tokens]
    if len(fitting) < wanted:
        raise SimulationError(
            f"{path} has {len(fitting)} single-turn conversations below {most_tokens} tokens, "
            f"{wanted} are needed: lower the rate or the duration"
        )
    kept = sorted(fitting[:wanted], key=lambda turn: turn[3])
    models = sorted({turn[0] for turn in kept})
    stamps = np.array([turn[3] for turn in kept], np.float64)
    span = stamps[-1] - stamps[0]
    adapter = np.array([models.index(turn[0]) for turn in kept], np.int64)
    return Trace(
        name=f"lmsys {path.name} R={rate:g}",
        arrival_s=(stamps - stamps[0]) * (duration_s / span if span else 0.0),
        adapter=adapter,
        prompt_len=np.array([turn[1] for turn in kept], np.int64),
        output_len=np.array([turn[2] for turn in kept], np.int64),
        num_adapters=len(models),
        rate=rate,
        duration_s=duration_s,
        tenant=adapter,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise SimulationError(f"cannot read {path} as JSON lines: {error}") from error


def _single_turn(line: dict[str, Any]) -> tuple[str, int, int, float] | None:
    """Return model, lengths and time of a conversation of one question and one answer."""
    try:
        model, stamp = str(line["model"]), float(line["tstamp"])
        if "prompt_len" in line:
            return model, max(1, int(line["prompt_len"])), max(1, int(line["output_len"])), stamp
        question, *answers = line["conversation"]
        if len(answers) != 1:
            return None
        lengths = (len(m["content"]) // _CHARS_PER_TOKEN for m in (question, answers[0]))
        prompt_len, output_len = (max(1, length) for length in lengths)
    except (KeyError, TypeError, ValueError) as error:
        raise SimulationError(f"a line of the log has no usable {error}") from error
    return model, prompt_len, output_len, stamp
