"""Measure the base and every adapter on the held-out sets, greedily, in float32, with PEFT itself.

The figures in README.md are this script's. They are also the reference for the server: the same
adapter served by loraplex must pass what it passes here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from generate_data import NAMES
from peft import PeftModel
from safetensors import safe_open
from score import PASS_RATE, Example, load_heldout, score
from train_adapters import HERE, load_base

MAX_ANSWER_LEN = 64  # tokens; the longest training answer is shorter


def answers(model: Any, tokenizer: Any, examples: list[Example]) -> list[str]:
    """Return the greedy answers to held-out prompts, each without the end-of-turn token.

    All prompts are one forward batch, padded on the left: a held-out set then takes seconds.
    """
    prompts = tokenizer.apply_chat_template(
        [example["messages"] for example in examples],
        add_generation_prompt=True,
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        tokens = model.generate(**prompts, max_new_tokens=MAX_ANSWER_LEN, do_sample=False)
    new_tokens = tokens[:, prompts["input_ids"].shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def pass_rate(model: Any, tokenizer: Any, name: str, verbose: bool) -> float:
    """Return the share of adapter `name`'s held-out set that `model` answers right."""
    examples = load_heldout(name)
    num_passed = 0
    for example, text in zip(examples, answers(model, tokenizer, examples), strict=True):
        passed = score(name, example, text)
        num_passed += passed
        if verbose:
            prompt = example["messages"][-1]["content"]
            print(f"  [{'pass' if passed else 'FAIL'}] {prompt!r} -> {text!r}", flush=True)
    return num_passed / len(examples)


def describe(folder: Path) -> tuple[str, str, float]:
    """Return an adapter's `(ranks, targets, megabytes)` as its files say."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    path = folder / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as tensors:
        keys = [key for key in tensors.keys() if "lora_A" in key]  # noqa: SIM118 (not a mapping)
        ranks = sorted({tensors.get_slice(key).get_shape()[0] for key in keys})
    targets = ",".join(target.removesuffix("_proj") for target in config["target_modules"])
    return "/".join(map(str, ranks)), targets, path.stat().st_size / 1e6


def main() -> None:
    """Print one row per adapter, then the same as one JSON line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", choices=NAMES, help="evaluate one adapter (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every answer")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = [args.only] if args.only else NAMES
    tokenizer, model = load_base(torch.float32)
    base = {name: pass_rate(model, tokenizer, name, args.verbose) for name in names}
    rows = ["| adapter | rank | targets | MB | base passes | adapter passes | threshold |"]
    rows.append("|---|---|---|---|---|---|---|")
    rates = {}
    for name in names:
        ranks, targets, size_mb = describe(HERE / name)
        adapted = PeftModel.from_pretrained(model, HERE / name)
        rates[name] = pass_rate(adapted.eval(), tokenizer, name, args.verbose)
        model = adapted.unload()  # the base again: the next adapter must not sit on this one
        row = (name, ranks, targets, f"{size_mb:.2f}", base[name], rates[name], PASS_RATE[name])
        rows.append("| " + " | ".join(map(str, row)) + " |")
    print("\n".join(rows))
    print(json.dumps({"base": base, "adapter": rates}))


if __name__ == "__main__":
    main()
