"""`peft_type=ADALORA`."""

from __future__ import annotations

from functools import partial
from typing import Final

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.folds.adalora import fold_adalora
from loraplex_server.adapters.formats.field_table import dropout, linear_fields
from loraplex_server.adapters.formats.folded import FoldedReading, PlannedFold
from loraplex_server.adapters.formats.folder import PeftFolder

_SCHEDULE: Final = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step")
_ONLY_LORA: Final = "PEFT's AdaLoRA has no such option; retrain without it"

FIELDS: Final = linear_fields(
    "init_r",
    "lora_alpha",
    "init_lora_weights",
    without=("init_weights",),
    no_effect={
        "r": "AdaLoRA begins with init_r",
        "use_rslora": "AdaLoRA has its own scale",
        "alpha_pattern": "AdaLoRA does not read it",
        "rank_pattern": "the tensors hold the ranks that are left",
        "runtime_config": "how PEFT runs it",
        "loftq_config": "initialisation only",
        "eva_config": "initialisation only",
        "corda_config": "initialisation only",
        "lora_ga_config": "initialisation only",
        "megatron_core": "read only with megatron_config",
        "velora_config": "changes how gradients are computed, and no output",
        "qalora_group_size": "read only with use_qalora",
        "ensure_weight_tying": "about embeddings, which AdaLoRA does not adapt",
        "orth_reg_weight": "a term of the training loss",
        **dict.fromkeys(_SCHEDULE, "the schedule of training"),
        **dropout("lora_dropout"),
    },
    unsupported=dict.fromkeys(
        (
            "use_dora",
            "lora_bias",
            "trainable_token_indices",
            "alora_invocation_tokens",
            "use_qalora",
            "use_bdlora",
            "layer_replication",
            "target_parameters",
            "megatron_config",
            "arrow_config",
            "kasa_config",
            "monteclora_config",
        ),
        _ONLY_LORA,
    ),
)


def read_adalora(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read an AdaLoRA, pruned or not; a `FormatReader`."""
    reading = FoldedReading(folder, base, FIELDS, own_bias="lora_only")
    initial_rank = folder.config.positive_int("init_r", 12)
    alpha = folder.config.number("lora_alpha", 8)
    if alpha <= 0:
        folder.config.refuse(
            "lora_alpha", "PEFT then scales by ranks that change when it reloads; set it above 0"
        )
    if not isinstance(folder.config.raw("init_lora_weights", True), bool):
        folder.config.refuse("init_lora_weights", "AdaLoRA knows true and false")
    folds = []
    for group in folder.linears(("lora_A", "lora_B", "lora_E"), rule=reading.rule):
        num_in, num_out = reading.shape(group.linear)
        rank = (folder.shape(group.names["lora_E"]) or (0,))[0]
        how = "E times A, over init_r"
        a = folder.take(group.names["lora_A"], (rank, num_in), fold=how)
        b = folder.take(group.names["lora_B"], (num_out, rank), fold=how)
        e = folder.take(group.names["lora_E"], (rank, 1), fold=how)
        if rank > initial_rank:
            folder.refuse(group.names["lora_E"], f"holds more than init_r={initial_rank} ranks")
        if rank > 0:
            compute = partial(fold_adalora, a, b, e, scale=alpha, initial_rank=initial_rank)
            folds.append(PlannedFold(group.linear, rank, compute))
    return reading.finish(folds)
