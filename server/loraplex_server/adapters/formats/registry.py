"""Which reader reads which `peft_type`, and why the others have none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.formats.adalora import read_adalora
from loraplex_server.adapters.formats.deft import read_deft
from loraplex_server.adapters.formats.delora import read_delora
from loraplex_server.adapters.formats.folder import PeftFolder
from loraplex_server.adapters.formats.gralora import read_gralora
from loraplex_server.adapters.formats.hra import read_hra
from loraplex_server.adapters.formats.ia3 import read_ia3
from loraplex_server.adapters.formats.kv_prefix import read_cartridge, read_prefix
from loraplex_server.adapters.formats.lora import read_lora
from loraplex_server.adapters.formats.lycoris import read_loha, read_lokr
from loraplex_server.adapters.formats.miss import read_bone, read_miss
from loraplex_server.adapters.formats.norms import read_ln_tuning
from loraplex_server.adapters.formats.paca import read_paca
from loraplex_server.adapters.formats.poly import read_poly
from loraplex_server.adapters.formats.refusals import REFUSED as REFUSED
from loraplex_server.adapters.formats.soft_prompts import read_multitask_prompt, read_soft_prompt
from loraplex_server.adapters.formats.tinylora import read_tinylora
from loraplex_server.adapters.formats.trainable_tokens import read_trainable_tokens
from loraplex_server.adapters.formats.unilora import read_unilora
from loraplex_server.adapters.formats.vblora import read_vblora
from loraplex_server.adapters.formats.vectors import read_beft, read_ssf
from loraplex_server.adapters.formats.vera import read_pvera, read_vera

#: Reads one kind of adapter. Faults go to the folder's ledger; what is returned then is not used.
#: A configuration field or a tensor that it does not touch is refused by name.
FormatReader = Callable[[PeftFolder, BaseModel], AdapterWeights]

READERS: Final[Mapping[str, FormatReader]] = {
    "ADALORA": read_adalora,
    "BEFT": read_beft,
    "BONE": read_bone,
    "CARTRIDGE": read_cartridge,
    "CPT": read_soft_prompt,
    "DEFT": read_deft,
    "DELORA": read_delora,
    "GRALORA": read_gralora,
    "HRA": read_hra,
    "IA3": read_ia3,
    "LN_TUNING": read_ln_tuning,
    "LOHA": read_loha,
    "LOKR": read_lokr,
    "LORA": read_lora,
    "MISS": read_miss,
    "MULTITASK_PROMPT_TUNING": read_multitask_prompt,
    "PACA": read_paca,
    "POLY": read_poly,
    "PREFIX_TUNING": read_prefix,
    "PROMPT_TUNING": read_soft_prompt,
    "PVERA": read_pvera,
    "P_TUNING": read_soft_prompt,
    "SSF": read_ssf,
    "TINYLORA": read_tinylora,
    "TRAINABLE_TOKENS": read_trainable_tokens,
    "UNILORA": read_unilora,
    "VBLORA": read_vblora,
    "VERA": read_vera,
}
