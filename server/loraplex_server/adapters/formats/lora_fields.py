"""Every field of PEFT's `LoraConfig`: read, or known to have no effect, or refused when it is on.

Written from PEFT 0.21; a test compares it with the installed `LoraConfig`, so that a new field is
noticed when PEFT is upgraded, not when a customer uploads it. A field we do not know must be off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.formats.biases import BiasMode, read_bias_mode
from loraplex_server.adapters.formats.config_fields import ConfigFields
from loraplex_server.adapters.formats.rank_rule import RankRule
from loraplex_server.adapters.peft_targets import TargetRule

#: Read by `read_lora_fields` and by the readers of the parts beside the pairs.
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
        "lora_bias",
        "fan_in_fan_out",
        "use_dora",
        "kasa_config",
        "use_bdlora",
        "use_qalora",
        "qalora_group_size",
        "alora_invocation_tokens",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
    }
)

#: Of every PEFT configuration; `ConfigFields.read_common` reads them.
COMMON: Final = frozenset({"auto_mapping", "peft_version", "revision", "inference_mode"})

#: Cannot change what the adapter computes once it is trained.
WITHOUT_EFFECT: Final[Mapping[str, str]] = {
    "runtime_config": "how PEFT runs it",
    "lora_dropout": "training only",
    "eva_config": "initialisation only, and EVA leaves the base as it is",
    "loftq_config": "read only with init_lora_weights='loftq', which is refused",
    "corda_config": "read only with init_lora_weights='corda', which is refused",
    "lora_ga_config": "read only with init_lora_weights='lora_ga', which is refused",
    "megatron_core": "read only with megatron_config, which is refused",
    "velora_config": "changes how gradients are computed, and no output",
}

#: Must be off; the text is what it is and the nearest way out.
UNSUPPORTED: Final[Mapping[str, str]] = {
    "layer_replication": "replicated layers make another base model; serve the expanded model "
    "as the base",
    "target_parameters": "LoRA on bare parameters (expert weights) is not supported; retrain on "
    "linear modules",
    "megatron_config": "Megatron's parallel layers are not supported; convert the adapter to "
    "plain LoRA first",
    "arrow_config": "routes every token between adapters; upload the adapters one by one",
    "monteclora_config": "Monteclora samples around the weights, so it has no one output; retrain "
    "without it",
    # Fields of PEFT releases before 0.4.
    "enable_lora": "merged-linear LoRA is not supported; save the adapter again with a newer PEFT",
    "merge_weights": "weights merged into the base cannot be served; save the adapter unmerged",
}

#: Initialisations that leave the base weights as they are.
_PLAIN_INITS: Final[tuple[object, ...]] = (True, False, "gaussian", "eva", "orthogonal", "mica")
#: Initialisations that are computed from the base weights alone, so that they can be taken out.
_FOLDED_INITS: Final = ("pissa", "olora")
#: Those whose changes of the base nothing in the file tells. PEFT itself reloads such files wrong.
_LOST_INITS: Final = ("corda", "lora_ga", "pissa_niter")

_CONVERT: Final = (
    "the adapter belongs to a base whose weights the initialisation changed, and the file does not "
    "tell how; save it again with "
    "model.save_pretrained(path, path_initial_model_for_weight_conversion=<initial adapter>)"
)
_RETRAIN: Final = (
    "the adapter belongs to a base whose weights the initialisation changed; retrain with "
    "init_lora_weights=true"
)

Init = Literal["plain", "pissa", "olora"]


@dataclass(frozen=True)
class BlockDiagonal:
    """BD-LoRA: parts of module names whose A or B is stored as blocks."""

    num_blocks: int
    in_a: tuple[str, ...]
    in_b: tuple[str, ...]

    def blocks_of(self, module: str) -> tuple[int, int]:
        """Return in how many blocks A and B of the module are stored; 1 for a whole matrix."""
        has_a = any(part in module for part in self.in_a)
        has_b = any(part in module for part in self.in_b) and not has_a
        return (self.num_blocks if has_a else 1), (self.num_blocks if has_b else 1)


@dataclass(frozen=True)
class LoraFields:
    """The part of a LoRA configuration that decides what the adapter computes.

    Attributes:
        group_size: inputs that QA-LoRA pools into one; 1 for all others.
        is_tied_with_embedding: the head of a tied base has the embedding's LoRA, transposed; the
            file holds both.
    """

    ranks: RankRule
    targets: TargetRule
    init: Init
    bias: BiasMode
    has_lora_bias: bool
    use_dora: bool
    is_kasa: bool
    blocks: BlockDiagonal
    group_size: int
    invocation_token_ids: tuple[int, ...]
    is_tied_with_embedding: bool


def read_lora_fields(fields: ConfigFields, base: BaseModel) -> LoraFields:
    """Read all fields but those of whole modules and token rows."""
    fields.without_effect(WITHOUT_EFFECT)
    fields.must_be_off(UNSUPPORTED)
    if fields.flag("fan_in_fan_out"):
        fields.refuse("fan_in_fan_out", "is for Conv1D models; save the adapter again with false")
    _check_variants(fields)
    init = _read_init(fields)
    return LoraFields(
        ranks=fields.rank_rule(),
        targets=fields.target_rule(),
        init=init,
        bias=read_bias_mode(fields, own="lora_only"),
        has_lora_bias=fields.flag("lora_bias"),
        use_dora=fields.flag("use_dora"),
        is_kasa=_read_kasa(fields),
        blocks=_read_blocks(fields),
        group_size=_read_group_size(fields),
        invocation_token_ids=fields.int_list("alora_invocation_tokens", below=base.vocab_size)
        or (),
        is_tied_with_embedding=fields.flag("ensure_weight_tying"),
    )


#: PEFT has no layer for two of these at once.
_VARIANTS: Final = (
    "use_dora",
    "use_bdlora",
    "use_qalora",
    "alora_invocation_tokens",
    "kasa_config",
)


def _check_variants(fields: ConfigFields) -> None:
    # A nested configuration without fields is one with PEFT's defaults.
    chosen = [field for field in _VARIANTS if fields.peek(field) not in (None, False, [])]
    for field in chosen[1:]:
        fields.refuse(field, f"PEFT does not combine it with {chosen[0]}")
    init = _lower(fields.peek("init_lora_weights"))
    for field in chosen:
        if field != "use_dora" and init in _FOLDED_INITS:
            fields.refuse(field, f"cannot be combined with init_lora_weights={init!r}, {_RETRAIN}")
    if fields.is_on("lora_bias") and fields.is_on("use_dora"):
        fields.refuse("lora_bias", "PEFT does not combine it with use_dora")


def _lower(init: object) -> object:
    """Return the initialisation without capitals where PEFT does not mind them."""
    ignores_case = isinstance(init, str) and init.lower() in ("olora", "gaussian", "mica")
    return init.lower() if ignores_case and isinstance(init, str) else init


def _read_init(fields: ConfigFields) -> Init:
    init = _lower(fields.raw("init_lora_weights", True))
    if isinstance(init, bool | str) and init in _PLAIN_INITS:
        return "plain"
    if init == "pissa":
        return "pissa"
    if init == "olora":
        return "olora"
    name = init if isinstance(init, str) else ""
    if name.startswith(_LOST_INITS):
        fields.refuse("init_lora_weights", _CONVERT)
    elif name == "loftq":
        fields.refuse("init_lora_weights", _RETRAIN)
    else:
        reason = "unknown initialisation; if it leaves the base as it is, save with true"
        fields.refuse("init_lora_weights", reason)
    return "plain"


def _read_kasa(fields: ConfigFields) -> bool:
    """Return whether it is KaSA; its own fields weigh terms of the training loss."""
    value = fields.raw("kasa_config")
    if value is None:
        return False
    if not isinstance(value, dict) or not set(value) <= {"beta", "gamma"}:
        fields.refuse("kasa_config", "known are beta and gamma")
        return False
    return True


#: In a list of BD-LoRA's; each is looked for in the name of each linear.
_MAX_NAMES: Final = 1000


def _read_blocks(fields: ConfigFields) -> BlockDiagonal:
    value = fields.raw("use_bdlora")
    whole = BlockDiagonal(1, (), ())
    if value is None or value is False:
        return whole
    known = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}
    if not isinstance(value, dict) or not set(value) <= known:
        fields.refuse("use_bdlora", f"known are {', '.join(sorted(known))}")
        return whole
    num_blocks = value.get("nblocks", 1)
    lists = [value.get(f"target_modules_bd_{side}") or [] for side in "ab"]
    names = [list_ for list_ in lists if isinstance(list_, list)]
    are_names = all(isinstance(name, str) for list_ in names for name in list_)
    if (
        type(num_blocks) is not int
        or not 1 <= num_blocks <= 1024
        or len(names) < 2
        or max(map(len, names)) > _MAX_NAMES
        or not are_names
    ):
        fields.refuse("use_bdlora", "needs a number of blocks and lists of module names")
        return whole
    return BlockDiagonal(num_blocks, tuple(names[0]), tuple(names[1]))


def _read_group_size(fields: ConfigFields) -> int:
    """Return how many inputs QA-LoRA pools; 1 for every other adapter."""
    if not fields.flag("use_qalora"):
        fields.without_effect({"qalora_group_size": "read only with use_qalora, which is off"})
        return 1
    return fields.positive_int("qalora_group_size", 16)
