"""Which reader reads which `peft_type`, and why the others have none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.formats.folder import PeftFolder
from loraplex_server.adapters.formats.lora import read_lora

#: Reads one kind of adapter. Faults go to the folder's ledger; what is returned then is not used.
#: A configuration field or a tensor that it does not touch is refused by name.
FormatReader = Callable[[PeftFolder, BaseModel], AdapterWeights]

READERS: Final[Mapping[str, FormatReader]] = {
    "LORA": read_lora,
}

#: Kinds of adapters that cannot be served exactly, with the reason and the nearest way out.
REFUSED: Final[Mapping[str, str]] = {}
