"""Adapters of many kinds on the real model, from a folder that PEFT saved to greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)

from loraplex_memory.layout import PoolLayout
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.folder_reader import FolderReader
from loraplex_server.adapters.registration import Registration
from loraplex_server.engine.adapted_prompt import adapt_prompt
from tests.support.engine import drive, greedy_request, make_core

pytestmark = pytest.mark.model

ATTENTION = ["q_proj", "v_proj"]
NUM_TOKENS = 8

#: How PEFT makes each; a few layers where a kind takes long to fold.
KINDS: dict[str, Callable[[], object]] = {
    "dora": lambda: LoraConfig(r=8, target_modules=ATTENTION, use_dora=True),
    "rslora": lambda: LoraConfig(r=16, target_modules="all-linear", use_rslora=True),
    "biases": lambda: LoraConfig(r=4, target_modules=ATTENTION, lora_bias=True),
    "tokens": lambda: LoraConfig(
        r=4, target_modules=ATTENTION, trainable_token_indices=[28, 198, 260]
    ),
    "pissa": lambda: LoraConfig(
        r=4, target_modules=["v_proj"], layers_to_transform=[3], init_lora_weights="pissa"
    ),
    "adalora": lambda: AdaLoraConfig(init_r=8, target_r=4, target_modules=ATTENTION, total_step=10),
    "vera": lambda: VeraConfig(r=32, target_modules=["v_proj"]),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


def shake(model: torch.nn.Module) -> None:
    """Give what was trained random values that change the answers and keep them finite."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                size = parameter.abs().mean().item() or 0.05
                parameter.add_(noise * 0.5 * size)


def adapted(name, manifest, prompt, vocab_size):
    """Return the request of an adapter, with whatever stands before its prompts."""
    found = adapt_prompt(manifest, prompt, vocab_size)
    request = greedy_request(
        name, found.token_ids, found.adapter, max_tokens=NUM_TOKENS, ignore_eos=True
    )
    return replace(request, num_virtual=found.num_virtual)


def greedy(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    with torch.inference_mode():
        found = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=-1,
            pad_token_id=0,
        )
    return found[0, -NUM_TOKENS:].tolist()


@pytest.mark.filterwarnings("ignore")
def test_every_kind_answers_as_peft_in_one_batch(
    source, model, reference, chat_prompts, tmp_path, capsys
):
    prompt = chat_prompts["sql"][0]
    expected, folders = {"base": greedy(reference.fresh_base(), prompt)}, {}
    for name, make in KINDS.items():
        tuned = get_peft_model(reference.fresh_base(), make())
        shake(tuned)
        folders[name] = tmp_path / name
        tuned.save_pretrained(folders[name])
        again = PeftModel.from_pretrained(reference.fresh_base(), folders[name])
        expected[name] = greedy(again.eval(), prompt)
    catalog = AdapterCatalog(
        data_dir=tmp_path / "data",
        pool_layout=PoolLayout(model.spec.geometry),
        base_name=source.name,
        reader=FolderReader(BaseModel.open(source, model.spec), (source.name,)),
    )
    requests = [greedy_request("base", prompt, max_tokens=NUM_TOKENS, ignore_eos=True)]
    for name, folder in folders.items():
        catalog.register(Registration(name, check_base=False), folder)
        manifest = catalog.acquire(name).manifest
        requests.append(adapted(name, manifest, prompt, model.spec.vocab_size))
    core = make_core(model, num_pages=2000, max_step_tokens=2048)
    outputs = drive(core, requests)
    core.close()
    catalog.close()
    same = [name for name in expected if outputs[name] == expected[name]]
    with capsys.disabled():
        print(f"\n  {len(same)} of {len(expected)} kinds: {NUM_TOKENS} tokens each identical")
    assert outputs == expected
    assert len({tuple(tokens) for tokens in expected.values()}) > len(expected) / 2
