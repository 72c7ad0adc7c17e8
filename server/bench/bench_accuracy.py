"""What bfloat16 and int8 weights change: greedy tokens and logits against float32, same weights.

Two questions. Greedy: of 200 prompts (50 of each task of the examples, in the model's chat
template), how many get the same first 32 tokens as in float32? One token that flips changes all
behind it, so this asks whether no near tie of 6,400 tokens fell the other way. Teacher-forced: on
the texts that float32 wrote, how far are logits from its own at every token of the answer?

transformers' own bfloat16 on a CPU is among the arms, as rounding activations costs anyone tokens.
Nothing is timed here, and the result does not depend on how busy the machine is.

    python server/bench/bench_accuracy.py [--model FOLDER] [--prompts 50] [--skip-transformers]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from loraplex_kernels.batch import build_attention_batch
from loraplex_kernels.ops import host_backend
from loraplex_memory.layout import PoolLayout
from loraplex_memory.pool import PagePool
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.plan import Request, TokenEvent
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.build import assemble_core
from loraplex_server.model.loader import load_weights
from loraplex_server.model.source import ModelSource, resolve_model
from loraplex_server.model.spec import ModelSpec
from loraplex_server.model.transformer import Transformer
from loraplex_server.text.vocabulary import Vocabulary

EXAMPLES = Path(__file__).resolve().parents[2] / "clients" / "examples"
NUM_TOKENS = 32
MAX_LEN = 512
SEED = 8
#: Every so many entries of the vocabulary are kept for percentiles; means and maxima are of all.
SAMPLED = 16

Tokens = tuple[int, ...]


class Arm(Protocol):
    """One way of computing the model."""

    def greedy(self, prompts: Sequence[Tokens]) -> list[Tokens]:
        """Return each prompt's first NUM_TOKENS greedy tokens, fewer where the answer ends."""

    def logits(self, text: Tokens, first: int) -> torch.Tensor:
        """Return float32 `[len(text) - first, V]`: what the tokens from `first` on come from."""


class OurModel:
    """The model as it is served."""

    def __init__(self, source: ModelSource, dtype: torch.dtype, quantization: str) -> None:
        spec = spec_of(source)
        weights = load_weights(source, spec, dtype=dtype, quantization=quantization)
        self._model = Transformer(spec, weights, max_model_len=MAX_LEN)
        layout = PoolLayout(spec.geometry)
        self._pool = PagePool(layout, 32 * layout.pages_for_tokens(MAX_LEN), dtype=dtype)
        self._backend = host_backend()

    def greedy(self, prompts: Sequence[Tokens]) -> list[Tokens]:
        limits = SchedulerLimits(
            max_step_tokens=512,
            max_running=32,
            max_model_len=MAX_LEN,
            eos_token_ids=self._model.spec.eos_token_ids,
        )
        core = assemble_core(self._model, self._pool, limits)
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
        answers: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            answers[str(i)] = []
            core.add(Request(str(i), prompt, sampling))
        while core.has_work:
            for event in core.step():
                if isinstance(event, TokenEvent):
                    answers[event.request_id].append(event.token.token_id)
        core.close()
        return [tuple(answer) for answer in answers.values()]

    def logits(self, text: Tokens, first: int) -> torch.Tensor:
        layout = self._pool.layout
        num_inputs = len(text) - 1
        attention = build_attention_batch(
            spans=[(0, num_inputs)],
            block_tables=[list(range(layout.pages_for_tokens(num_inputs)))],
            page_tokens=layout.page_tokens,
        )
        rows = torch.arange(first - 1, num_inputs)
        ops = self._backend.prepare(attention, None, [])
        return self._model.forward(torch.tensor(text[:-1]), ops, self._pool, rows).clone()


class Transformers:
    """transformers in bfloat16, one prompt at a time."""

    def __init__(self, source: ModelSource) -> None:
        from transformers import AutoModelForCausalLM

        folder, gguf = source.path, None
        if source.path.is_file():
            folder, gguf = source.path.parent, source.path.name
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), gguf_file=gguf, dtype=torch.float32
        )
        self._model: Any = model.to(torch.bfloat16).eval()
        self._eos = spec_of(source).eos_token_ids

    @torch.inference_mode()
    def greedy(self, prompts: Sequence[Tokens]) -> list[Tokens]:
        answers = []
        for prompt in prompts:
            output = self._model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=sorted(self._eos),
                pad_token_id=0,
            )
            answers.append(tuple(output[0, len(prompt) :].tolist()))
        return answers

    @torch.inference_mode()
    def logits(self, text: Tokens, first: int) -> torch.Tensor:
        logits: torch.Tensor = self._model(torch.tensor([text[:-1]])).logits
        return logits[0, first - 1 :].float()


def spec_of(source: ModelSource) -> ModelSpec:
    return ModelSpec.from_config(
        source.load_config(), base_name=source.name, eos_token_ids=source.generation_eos_ids()
    )


def make_prompts(source: ModelSource, num_each: int) -> list[Tokens]:
    """Return so many distinct prompts of each task of the examples, as token ids."""
    sys.path.insert(0, str(EXAMPLES))
    import generate_data

    spec = spec_of(source)
    vocabulary = Vocabulary(source.load_tokenizer(), size=spec.vocab_size)
    prompts = []
    for name in generate_data.NAMES:
        examples = generate_data.train_examples(name, SEED)
        texts = {vocabulary.render_chat(example["messages"]) for example in examples}
        chosen = random.Random(SEED).sample(sorted(texts), num_each)
        prompts += [tuple(vocabulary.encode(t, add_special_tokens=False)) for t in chosen]
    return prompts


@dataclass
class LogitErrors:
    """Differences of logits from float32's, gathered text by text."""

    sampled: list[np.ndarray] = field(default_factory=list)
    margins: list[torch.Tensor] = field(default_factory=list)
    divergences: list[torch.Tensor] = field(default_factory=list)
    total: float = 0.0
    largest: float = 0.0
    count: int = 0
    num_agreeing: int = 0

    def add(self, expected: torch.Tensor, found: torch.Tensor) -> None:
        """Take in the logits of one text, both float32 `[n, V]`."""
        off = (found - expected).abs()
        self.sampled.append(off[:, ::SAMPLED].numpy().copy())
        self.total += float(off.double().sum())
        self.largest = max(self.largest, float(off.max()))
        self.count += off.numel()
        best = expected.topk(2).indices
        margin = (t.gather(1, best) for t in (expected, found))
        before, after = (pair[:, 0] - pair[:, 1] for pair in margin)
        self.margins.append((after - before).abs())
        self.num_agreeing += int((found.argmax(-1) == best[:, 0]).sum())
        p, q = expected.log_softmax(-1), found.log_softmax(-1)
        self.divergences.append((p.exp() * (p - q)).sum(-1))

    def summary(self) -> dict[str, Any]:
        sampled = np.concatenate([s.ravel() for s in self.sampled])
        p50, p99 = np.quantile(sampled, (0.5, 0.99))
        off = {"mean": self.total / self.count, "p50": p50, "p99": p99, "max": self.largest}
        margins = torch.cat(self.margins)
        return {
            "logit": {name: float(value) for name, value in off.items()},
            "margin": _distribution(margins),
            "kl": _distribution(torch.cat(self.divergences)),
            "same_best": self.num_agreeing / len(margins),
        }


def _distribution(values: torch.Tensor) -> dict[str, float]:
    p50, p99 = values.quantile(torch.tensor([0.5, 0.99])).tolist()
    return {"mean": float(values.mean()), "p50": p50, "p99": p99, "max": float(values.max())}


def same_tokens(expected: Sequence[Tokens], found: Sequence[Tokens]) -> dict[str, float]:
    """Return which share of answers is identical, and which of all tokens by position."""
    pairs = list(zip(expected, found, strict=True))
    num_same = sum(a == b for e, f in pairs for a, b in zip(e, f, strict=False))
    return {
        "prompts": sum(e == f for e, f in pairs) / len(pairs),
        "tokens": num_same / sum(len(e) for e in expected),
    }


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    source = resolve_model(options.model)
    prompts = make_prompts(source, options.prompts)
    reference = OurModel(source, torch.float32, "none")
    answers = reference.greedy(prompts)
    texts = [
        (prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    expected = [reference.logits(*text) for text in texts]
    check_reference(expected, answers)
    top = torch.cat([logits.topk(2).values for logits in expected])
    arms: dict[str, Any] = {
        "bfloat16": lambda: OurModel(source, torch.bfloat16, "none"),
        "int8, bfloat16": lambda: OurModel(source, torch.bfloat16, "int8"),
        "int8, float32": lambda: OurModel(source, torch.float32, "int8"),
    }
    if not options.skip_transformers:
        arms["transformers bfloat16"] = lambda: Transformers(source)
    results = {
        name: measure(make(), prompts, answers, texts, expected) for name, make in arms.items()
    }
    report(results, _distribution(top[:, 0] - top[:, 1]), source.name, options)


def check_reference(expected: Sequence[torch.Tensor], answers: Sequence[Tokens]) -> None:
    """See that the logits of a whole text are those that its answer was drawn from."""
    for logits, answer in zip(expected, answers, strict=True):
        assert tuple(logits.argmax(-1).tolist()) == answer, "prefill and decode disagree"


def measure(
    arm: Arm,
    prompts: Sequence[Tokens],
    answers: Sequence[Tokens],
    texts: Sequence[tuple[Tokens, int]],
    expected: Sequence[torch.Tensor],
) -> dict[str, Any]:
    errors = LogitErrors()
    for text, logits in zip(texts, expected, strict=True):
        errors.add(logits, arm.logits(*text))
    return {"greedy": same_tokens(answers, arm.greedy(prompts)), **errors.summary()}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the server's")
    parser.add_argument("--prompts", type=int, default=50, help="of each of the four tasks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--skip-transformers", action="store_true")
    return parser.parse_args()


def report(
    results: dict[str, dict[str, Any]],
    margin: dict[str, float],
    model: str,
    options: argparse.Namespace,
) -> None:
    """Print a table, then one JSON line."""
    print(f"\n{model}, {4 * options.prompts} prompts, {NUM_TOKENS} tokens, against float32")
    print(f"{'':22} {'same':>16} {'forced':>7}   logit error: mean, p50, p99, max")
    print(f"{'':22} {'prompts':>8}{'tokens':>8} {'best':>7}   change of margin; KL divergence")
    for name, r in results.items():
        same = f"{r['greedy']['prompts']:8.1%}{r['greedy']['tokens']:8.1%} {r['same_best']:7.2%}"
        for key in ("logit", "margin", "kl"):
            spread = " ".join(f"{value:9.5f}" for value in r[key].values())
            print(f"{name if key == 'logit' else '':22} {same}   {key:6} {spread}")
            same = " " * len(same)
    print(f"float32's margin of the best token: {margin}")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    line = {
        "benchmark": "bench_accuracy",
        "commit": commit,
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("loraplex", "torch", "transformers")},
        "model": model,
        "num_prompts": 4 * options.prompts,
        "num_tokens": NUM_TOKENS,
        "margin": margin,
        "arms": results,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
