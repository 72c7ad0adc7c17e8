"""Cases of `peft_type=LORA`: everything that its configuration can say."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import (
    BdLoraConfig,
    CordaConfig,
    KasaConfig,
    LoraGAConfig,
    VeloraConfig,
)
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

from tests.support.peft_cases import (
    LINEARS,
    Config,
    Naive,
    PeftCase,
    Tensors,
    biased_base,
    dropped,
    fields,
    make_base,
    make_prompts,
    randomise,
    tied_base,
    trained,
)

INVOCATION = [5, 9, 5]


def lora(
    name: str,
    naive: Naive | None = None,
    *,
    base: Callable[[], Any] = make_base,
    strength: float = 0.15,
    **options: Any,
) -> PeftCase:
    """Return the case of one configuration of LoRA."""

    def make(model: Any) -> Any:
        settings = {"target_modules": LINEARS, "task_type": "CAUSAL_LM", **options}
        return trained(model, LoraConfig(**settings), strength=strength)

    return PeftCase(name, make, naive, base)


def phi3_base() -> Any:
    return make_base("phi3")


def qwen3_base() -> Any:
    return make_base("qwen3", head_dim=16)


def invocation_prompts() -> list[list[int]]:
    """Return prompts with the invocation twice, once at their start, and not at all."""
    first, second, third = make_prompts()
    return [
        [*first[:4], *INVOCATION, *first[4:9], *INVOCATION, *first[9:]],
        [*INVOCATION, *second],
        third,
    ]


def every_token(config: Config, tensors: Tensors) -> None:
    """An activated LoRA taken for one that holds everywhere."""
    config["alora_invocation_tokens"] = None


def whole_blocks(config: Config, tensors: Tensors) -> None:
    """Blocks taken for columns that repeat."""
    config["use_bdlora"] = None
    for name, tensor in tensors.items():
        is_blocks = tensor.shape[1] == 4 or any(
            p in name for p in ("o_proj.lora_A", "down_proj.lora_A")
        )
        if is_blocks:
            tensors[name] = tensor.repeat(1, 2)


def untied_head(config: Config, tensors: Tensors) -> None:
    """Rows of a tied embedding kept away from the head: its own, unchanged."""
    rows = config["trainable_token_indices"]
    config["trainable_token_indices"] = {"embed_tokens": rows, "lm_head": [0]}
    head = tied_base().lm_head.weight[:1].detach().clone()
    tensors["base_model.model.lm_head.token_adapter.trainable_tokens_delta"] = head


PLAIN = [
    lora("plain", fields(lora_alpha=1)),
    lora(
        "rslora and patterns",
        fields(use_rslora=False),
        use_rslora=True,
        r=16,
        lora_alpha=8,
        rank_pattern={"layers.0.mlp.up_proj": 3, "v_proj": 5},
        alpha_pattern={"(q|k)_proj": 16, "layers.1.mlp.down_proj": 24},
        strength=0.1,
    ),
    lora("one layer", fields(lora_alpha=1), layers_to_transform=[1]),
    lora("gaussian", init_lora_weights="gaussian"),
    lora("eva", init_lora_weights="eva"),
    lora("orthogonal", init_lora_weights="orthogonal"),
    lora("mica", init_lora_weights="mica", strength=0.5),
    lora("velora", velora_config=VeloraConfig(num_groups=4)),
    lora("fused", base=phi3_base, target_modules=["qkv_proj", "o_proj", "gate_up_proj"]),
]

SCALED = [
    lora("dora", dropped("magnitude", use_dora=False), use_dora=True),
    lora(
        "dora on biased base",
        dropped("magnitude", use_dora=False),
        base=biased_base,
        use_dora=True,
        use_rslora=True,
        rank_pattern={"v_proj": 3},
    ),
    lora(
        "dora with trained biases",
        dropped("base_layer.bias", bias="none"),
        base=biased_base,
        use_dora=True,
        bias="lora_only",
    ),
    lora(
        "dora on fused linears",
        dropped("magnitude", use_dora=False),
        base=phi3_base,
        use_dora=True,
        target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    ),
    lora("lora_bias", dropped("lora_B.bias", lora_bias=False), lora_bias=True),
    lora(
        "lora_bias on biased base",
        dropped("lora_B.bias", lora_bias=False),
        base=biased_base,
        lora_bias=True,
        bias="all",
    ),
    lora(
        "bias all",
        dropped(".bias", bias="none"),
        base=biased_base,
        target_modules=["q_proj", "up_proj"],
        bias="all",
    ),
    lora("bias lora_only", dropped(".bias", bias="none"), base=biased_base, bias="lora_only"),
]

CHANGED_BASE = [
    lora("pissa", fields(init_lora_weights=True), init_lora_weights="pissa"),
    lora("olora", fields(init_lora_weights=True), init_lora_weights="olora"),
    lora(
        "pissa on fused linears",
        fields(init_lora_weights=True),
        base=phi3_base,
        init_lora_weights="pissa",
        target_modules=["qkv_proj", "down_proj"],
    ),
    lora(
        "pissa with dora",
        fields(init_lora_weights=True),
        init_lora_weights="pissa",
        use_dora=True,
        target_modules=["q_proj", "down_proj"],
    ),
    lora(
        "kasa",
        dropped("lora_diag", kasa_config=None),
        kasa_config=KasaConfig(),
        target_modules=["q_proj", "v_proj", "down_proj"],
    ),
    lora(
        "bdlora",
        whole_blocks,
        use_bdlora=BdLoraConfig(
            nblocks=2,
            target_modules_bd_a=["o_proj", "down_proj"],
            target_modules_bd_b=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
        ),
    ),
]

VOCABULARY = [
    lora(
        "embedding and head",
        dropped("embed_tokens", target_modules=["q_proj", "lm_head"]),
        target_modules=["q_proj", "embed_tokens", "lm_head"],
        rank_pattern={"lm_head": 4},
    ),
    lora(
        "tied embedding",
        dropped("embed_tokens", target_modules=["q_proj"]),
        base=tied_base,
        target_modules=["q_proj", "embed_tokens"],
    ),
    lora(
        "tied embedding and head",
        dropped("lm_head"),
        base=tied_base,
        target_modules=["q_proj", "embed_tokens"],
        ensure_weight_tying=True,
    ),
    lora(
        "dora on embedding and head",
        dropped("magnitude", use_dora=False),
        target_modules=["q_proj", "embed_tokens", "lm_head"],
        use_dora=True,
    ),
    lora("saved head", dropped("lm_head", modules_to_save=None), modules_to_save=["lm_head"]),
    lora(
        "saved embedding and head",
        dropped("embed_tokens", modules_to_save=["lm_head"]),
        modules_to_save=["embed_tokens", "lm_head"],
    ),
    lora(
        "saved tied embedding",
        dropped("embed_tokens", modules_to_save=None),
        base=tied_base,
        modules_to_save=["embed_tokens"],
    ),
    lora(
        "saved tied pair",
        dropped("lm_head", ensure_weight_tying=False),
        base=tied_base,
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    ),
    lora(
        "saved norms",
        dropped("norm", modules_to_save=None),
        modules_to_save=["norm", "input_layernorm", "post_attention_layernorm"],
    ),
    lora(
        "saved norms of heads",
        dropped("norm", modules_to_save=None),
        base=qwen3_base,
        modules_to_save=["q_norm", "k_norm"],
    ),
    lora(
        "token rows",
        dropped("token_adapter", trainable_token_indices=None),
        trainable_token_indices=list(range(90, 2, -2)),
        strength=0.3,
    ),
    lora(
        "tied token rows",
        untied_head,
        base=tied_base,
        trainable_token_indices=list(range(90, 2, -2)),
        strength=0.3,
    ),
    lora(
        "token rows of both",
        dropped("lm_head", trainable_token_indices={"embed_tokens": [3, 50]}),
        base=tied_base,
        trainable_token_indices={"embed_tokens": [3, 50], "lm_head": [60, 7, 8]},
        strength=0.2,
    ),
]


def other_embedding(name: str, base: Callable[[], Any]) -> PeftCase:
    """Return a LoRA on an embedding that is not the base's own, but saved with it."""

    def make(model: Any) -> Any:
        config = LoraConfig(target_modules=["q_proj", "embed_tokens"])
        tuned = trained(model, config)
        weight = tuned.get_input_embeddings().weight
        weight.data += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
        return tuned

    return PeftCase(name, make, dropped("base_layer"), base)


OTHER_EMBEDDINGS = [
    other_embedding("embedding of another base", make_base),
    other_embedding("tied embedding of another base", tied_base),
]

ACTIVATED = PeftCase(
    "alora",
    lambda base: trained(
        base,
        LoraConfig(
            target_modules=LINEARS, task_type="CAUSAL_LM", alora_invocation_tokens=INVOCATION
        ),
    ),
    every_token,
    prompts=invocation_prompts,
)


def converted(name: str, prepare: Callable[[Any], LoraConfig]) -> PeftCase:
    """Return an adapter whose initialisation changed the base, saved so that it does not."""

    def make(base: Any) -> Any:
        torch.manual_seed(1)
        model = get_peft_model(base, prepare(base))
        model.initial_folder = str(Path(tempfile.mkdtemp(), "initial"))
        config = model.peft_config["default"]
        init, config.init_lora_weights = config.init_lora_weights, True
        model.save_pretrained(model.initial_folder)
        config.init_lora_weights = init
        randomise(model)
        return model

    def save(model: Any, folder: Path) -> None:
        initial = model.initial_folder
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial)

    return PeftCase(f"{name}, converted", make, fields(lora_alpha=1), save=save)


def _corda(base: Any) -> LoraConfig:
    config = LoraConfig(
        target_modules=LINEARS,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"),
    )

    @torch.no_grad()
    def run() -> None:
        generator = torch.Generator().manual_seed(3)
        base(torch.randint(3, 101, (1, 512), generator=generator))

    preprocess_corda(base, config, run_model=run)
    return config


def _lora_ga(base: Any) -> LoraConfig:
    config = LoraConfig(
        target_modules=LINEARS, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
    )

    def step() -> None:
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(3, 101, (4, 32), generator=generator)
        base(ids, labels=ids).loss.backward()

    preprocess_loraga(base, config, step)
    return config


def _plain_init(init: str) -> Callable[[Any], LoraConfig]:
    return lambda base: LoraConfig(target_modules=LINEARS, init_lora_weights=init)


CONVERTED = [
    converted("pissa", _plain_init("pissa")),
    converted("pissa_niter_4", _plain_init("pissa_niter_4")),
    converted("olora", _plain_init("olora")),
    converted("corda", _corda),
    converted("lora_ga", _lora_ga),
]

LORA_CASES = [*PLAIN, *SCALED, *CHANGED_BASE, *VOCABULARY, *OTHER_EMBEDDINGS, ACTIVATED, *CONVERTED]
