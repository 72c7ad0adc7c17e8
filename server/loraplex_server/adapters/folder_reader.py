"""An adapter folder, read strictly into the internal form: the one reader of all PEFT's kinds.

Invariants: every tensor and every configuration field is applied or folded exactly, or is known to
change nothing, or the adapter is refused with all the reasons at once. Tensors stay on disk
(mapped memory) and are looked at one at a time; nothing is unpickled. What one adapter may cost
is bounded by `AdapterLimits`, the folded form included.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from loraplex_memory.adapter_spec import KV_PREFIX, MODEL_PARTS
from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.errors import AdapterRefused, InvalidUpload, UploadTooLarge
from loraplex_server.adapters.formats.config_fields import ConfigFields
from loraplex_server.adapters.formats.config_json import CONFIG_NAME, load_config_json
from loraplex_server.adapters.formats.folder import PeftFolder, dense_fault, is_finite
from loraplex_server.adapters.formats.ledger import Ledger
from loraplex_server.adapters.formats.registry import READERS, REFUSED
from loraplex_server.adapters.names import is_same_base
from loraplex_server.adapters.peft_pattern import PatternError
from loraplex_server.adapters.reader import ReadAdapter
from loraplex_server.adapters.record import AdapterLimits
from loraplex_server.adapters.safetensors_check import (
    CONVERT_PICKLE,
    WEIGHTS_NAME,
    check_safetensors_start,
)

_FLOAT32_MAX: Final = torch.finfo(torch.float32).max
#: Hidden states and activations of any model are smaller.
_MAX_INPUT: Final = 1e4
#: What an update may add to outputs, and a part may hold: with headroom, as they are multiplied.
_MAX_UPDATE: Final = 1e22
_MAX_PART: Final = 1e15
_TOO_LARGE: Final = (
    "holds numbers so large that sums pass float32; its training has diverged, so take an earlier "
    "checkpoint"
)
#: Parts that are as long as a prompt, a vocabulary or a list of tokens.
_DENSE_PARTS: Final = frozenset((*MODEL_PARTS, KV_PREFIX))


class FolderReader:
    """Reads folders for one base model; holds no state between folders, safe from any thread."""

    def __init__(
        self, base: BaseModel, base_names: Iterable[str], limits: AdapterLimits | None = None
    ) -> None:
        """Args:
        base: the served model; every tensor's shape follows from it.
        base_names: every name of it: as served, hub id, folder.
        """
        self._base = base
        self._base_names = tuple(base_names)
        self._limits = limits or AdapterLimits()

    def read(self, folder: Path, *, check_base: bool = True) -> ReadAdapter:
        """Read and check everything in `folder`; see `AdapterReader.read`."""
        fields = load_config_json(folder / CONFIG_NAME, max_bytes=self._limits.max_config_bytes)
        weights_path = self._find_weights(folder)
        ledger = Ledger()
        config = ConfigFields(fields, ledger)
        base_model = config.read_common()
        if check_base:
            self._check_base(base_model, ledger)
        try:
            with safe_open(weights_path, framework="pt") as file:
                weights = self._read(file, config, ledger)
        except SafetensorError as error:
            raise InvalidUpload(f"{WEIGHTS_NAME} is damaged or cut off: {error}") from error
        except PatternError as error:
            ledger.refuse(f"a pattern of the configuration {error}")
            raise AdapterRefused(ledger.reasons(), report=ledger.report()) from error
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # not in its stubs
            ledger.refuse(f"folding it fails: {error}")
            raise AdapterRefused(ledger.reasons(), report=ledger.report()) from error
        ledger.raise_if_any()
        return ReadAdapter(weights, base_model, ledger.report(), is_native=not ledger.is_folded)

    def _read(self, file: Any, config: ConfigFields, ledger: Ledger) -> AdapterWeights:
        """Return the weights, or anything after a fault."""
        kind = config.raw("peft_type")
        reader = READERS.get(kind) if isinstance(kind, str) else None
        if reader is None:
            ledger.refuse_field("peft_type", _why_not(config, kind))
            return AdapterWeights()
        num_tensors = len(file.keys())
        if num_tensors > self._limits.max_tensors:
            ledger.refuse(f"{num_tensors} tensors; at most {self._limits.max_tensors} are read")
            return AdapterWeights()
        folder = PeftFolder(file, config, self._base.geometry, self._limits, ledger)
        weights = reader(folder, self._base)
        config.finish()
        folder.finish()
        if not ledger:
            check_weights(weights, self._limits, ledger)
        return weights

    def _find_weights(self, folder: Path) -> Path:
        path = folder / WEIGHTS_NAME
        if not path.exists() and (folder / "adapter_model.bin").exists():
            raise InvalidUpload(f"adapter_model.bin is a pickle file; {CONVERT_PICKLE}")
        check_safetensors_start(path, max_header_bytes=self._limits.max_header_bytes)
        if path.stat().st_size > self._limits.max_upload_bytes:
            raise UploadTooLarge(self._limits.max_upload_bytes)
        return path

    def _check_base(self, recorded: str | None, ledger: Ledger) -> None:
        if recorded and not is_same_base(recorded, self._base_names):
            ledger.refuse_field(
                "base_model_name_or_path",
                f"trained on {recorded!r}, but the base served here is {self._base_names[0]!r}; "
                "if that is the same model under another name, upload with check_base=false",
            )


def _why_not(config: ConfigFields, kind: object) -> str:
    if isinstance(kind, str) and kind in REFUSED:
        return f"peft_type={config.show('peft_type')}: {REFUSED[kind]}"
    known = ", ".join(map(repr, sorted(READERS)))
    return (
        f"peft_type is {config.show('peft_type')}; supported are {known}: retrain with one of "
        "these, or convert the adapter to LoRA"
    )


def check_weights(weights: AdapterWeights, limits: AdapterLimits, ledger: Ledger) -> None:
    """Check what a reader made of a folder: size, and that every number is one."""
    if not weights.lora and not weights.parts:
        ledger.refuse(f"{WEIGHTS_NAME} holds no tensors of an adapter")
    for (layer, projection), pair in weights.lora.items():
        subject = f"layer {layer} {projection}"
        if pair.rank > limits.max_rank:
            ledger.refuse(
                f"folded rank {pair.rank} is above the limit of {limits.max_rank}", subject
            )
        elif not (is_finite(pair.a) and is_finite(pair.b)):
            ledger.refuse("folding it gives NaN or infinity", subject)
        elif _peak(pair.b) * abs(pair.scale) > _FLOAT32_MAX:
            ledger.refuse(f"lora_B times the scale {pair.scale:g} passes float32", subject)
        elif _largest_update(pair) > _MAX_UPDATE:
            ledger.refuse(_TOO_LARGE, subject)
    for (name, part_layer), tensor in weights.parts.items():
        if not is_finite(tensor):
            ledger.refuse("folding it gives NaN or infinity", f"{name} of layer {part_layer}")
        elif _peak(tensor) > _MAX_PART:
            ledger.refuse(_TOO_LARGE, f"{name} of layer {part_layer}")
    _check_dense_bytes(weights, limits, ledger)


def _check_dense_bytes(weights: AdapterWeights, limits: AdapterLimits, ledger: Ledger) -> None:
    sizes = {
        key: tensor.numel() * tensor.element_size()
        for key, tensor in weights.parts.items()
        if key[0] in _DENSE_PARTS
    }
    names = ", ".join(sorted({name for name, _ in sizes}))
    if (fault := dense_fault(sum(sizes.values()), names, limits)) is not None:
        ledger.refuse(fault)


def _largest_update(pair: LoRAPair) -> float:
    """Return a bound on what the pair adds to an output, and on every sum on the way."""
    inner = _MAX_INPUT * pair.a.shape[1] * _peak(pair.a)
    return max(inner, inner * pair.rank * _peak(pair.b) * abs(pair.scale))


def _peak(tensor: torch.Tensor) -> float:
    """Return the largest magnitude in `tensor`."""
    if tensor.numel() == 0:
        return 0.0
    low, high = tensor.aminmax()
    return max(abs(float(low)), abs(float(high)))
