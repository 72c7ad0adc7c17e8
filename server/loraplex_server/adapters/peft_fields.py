"""Every field of PEFT's `LoraConfig` that we know, and what becomes of each.

Three groups and nothing between them: a field is applied, or it cannot change the output of
`base + adapter` and is ignored for the reason noted, or it must be off. Written from PEFT 0.21; a
test compares it with the installed `LoraConfig`, so that a new field is noticed when PEFT is
upgraded, not when a customer uploads it. A field we do not know must be off too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: Read and obeyed by `peft_config`, `peft_targets` and `peft_format`.
APPLIED: Final = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "bias",
        "fan_in_fan_out",
    }
)

#: Cannot change what the adapter computes once it is trained.
WITHOUT_EFFECT: Final[Mapping[str, str]] = {
    "auto_mapping": "names the Python class of the base",
    "peft_version": "provenance",
    "revision": "provenance of the base",
    "inference_mode": "how PEFT loads it",
    "runtime_config": "how PEFT runs it",
    "lora_dropout": "training only",
    "eva_config": "initialisation only, and EVA leaves the base as it is",
    "loftq_config": "read only with init_lora_weights='loftq', which is refused",
    "corda_config": "read only with init_lora_weights='corda', which is refused",
    "lora_ga_config": "read only with init_lora_weights='lora_ga', which is refused",
    "megatron_core": "read only with megatron_config, which is refused",
    "qalora_group_size": "read only with use_qalora, which is refused",
    "ensure_weight_tying": "about embeddings and modules_to_save, which are refused",
}

#: Must be off; the text is what it is and the nearest way out.
UNSUPPORTED: Final[Mapping[str, str]] = {
    "use_dora": "DoRA scales the base weight too and is not supported yet; retrain with "
    "use_dora=False",
    "lora_bias": "a bias on lora_B is not supported yet; retrain with lora_bias=False",
    "modules_to_save": "modules trained in full are not supported yet; retrain with LoRA on "
    "attention and MLP linears only",
    "trainable_token_indices": "trained token embeddings are not supported yet; retrain without "
    "new or trained tokens",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported yet; retrain as plain LoRA",
    "layer_replication": "replicated layers make another base model; serve the expanded model "
    "as the base",
    "target_parameters": "LoRA on bare parameters (expert weights) is not supported; retrain on "
    "linear modules",
    "megatron_config": "Megatron's parallel layers are not supported; convert the adapter to "
    "plain LoRA first",
    "use_qalora": "QA-LoRA pools its inputs and is not supported; retrain with use_qalora=False",
    "use_bdlora": "block-diagonal LoRA is not supported yet; retrain as plain LoRA",
    "arrow_config": "routing between adapters is not supported; upload the adapters one by one",
    "kasa_config": "KaSA changes the base weights and is not supported yet; retrain as plain LoRA",
    "velora_config": "VeLoRA's own tensors are not read yet; retrain as plain LoRA",
    "monteclora_config": "Monteclora samples around the weights and is not supported; "
    "retrain without it",
    # Fields of PEFT releases before 0.4.
    "enable_lora": "merged-linear LoRA is not supported; save the adapter again with a newer PEFT",
    "merge_weights": "weights merged into the base cannot be served; save the adapter unmerged",
}

#: Initialisations that leave the base weights as they are.
PLAIN_INITS: Final[tuple[object, ...]] = (True, False, "gaussian", "eva", "orthogonal", "mica")

CONVERT_INIT: Final = (
    "the adapter belongs to a base whose weights the initialisation changed; save it again with "
    "model.save_pretrained(path, path_initial_model_for_weight_conversion=<initial adapter>)"
)
RETRAIN_INIT: Final = (
    "the adapter belongs to a base whose weights the initialisation changed; retrain with "
    "init_lora_weights=true"
)
CONVERTIBLE_INITS: Final = ("pissa", "olora", "corda", "lora_ga")


def is_off(value: object) -> bool:
    """Whether a configuration value is what PEFT writes for an option nobody switched on."""
    return value is None or value is False or value in ("", [], {})
