"""A PEFT LoRA folder, read strictly into the canonical weights.

Invariants: every tensor and every configuration field is applied exactly, or is known to change
nothing, or the adapter is refused with all the reasons at once. Weights stay on disk (mapped
memory) and are looked at one tensor at a time; nothing is unpickled.

A fused linear (Phi-3) has one A for all the projections it holds. `W + s B A` restricted to the
rows of one projection is `W[rows] + s B[rows] A`, so each projection gets the same A and its own
rows of B: exact, at the price of storing A once per projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError, safe_open

from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair, ModuleKey
from loraplex_memory.layout import ModelGeometry
from loraplex_server.adapters.errors import InvalidUpload, UploadTooLarge
from loraplex_server.adapters.ledger import Ledger
from loraplex_server.adapters.names import is_same_base
from loraplex_server.adapters.peft_config import (
    CONFIG_NAME,
    PeftConfig,
    PeftConfigReader,
    load_config_json,
)
from loraplex_server.adapters.peft_keys import LinearKey, parse_key
from loraplex_server.adapters.peft_pattern import PatternError
from loraplex_server.adapters.record import AdapterLimits
from loraplex_server.adapters.safetensors_check import (
    CONVERT_PICKLE,
    WEIGHTS_NAME,
    check_safetensors_start,
)

_DTYPES: Final = ("F32", "F16", "BF16")
_FLOAT32_MAX: Final = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class PeftAdapter:
    """A folder that passed every check.

    Attributes:
        weights: mapped from the folder's file, which must stay until they are no longer used.
        base_model: the base that the configuration names, if it names one.
    """

    weights: AdapterWeights
    base_model: str | None


@dataclass
class _Linear:
    """What the file holds for one linear: tensor names by side."""

    key: LinearKey
    names: dict[Literal["A", "B"], str] = field(default_factory=dict)


class PeftFolderReader:
    """Reads folders for one base model; holds no state between folders, safe from any thread.

    Args:
        geometry: of the served base; every tensor's shape follows from it.
        base_names: every name of the served base: as served, hub id, folder.
    """

    def __init__(
        self, geometry: ModelGeometry, base_names: Iterable[str], limits: AdapterLimits
    ) -> None:
        self._geometry = geometry
        self._base_names = tuple(base_names)
        self._limits = limits

    def read(self, folder: Path, *, check_base: bool = True) -> PeftAdapter:
        """Read and check everything in `folder`.

        Raises:
            AdapterRefused: it is an adapter, but not one that can be served exactly.
            InvalidUpload: the two files are missing, damaged or not what their names say.
            UploadTooLarge
            OSError: the disk failed.
        """
        fields = load_config_json(folder / CONFIG_NAME, max_bytes=self._limits.max_config_bytes)
        weights_path = self._find_weights(folder)
        ledger = Ledger()
        config = PeftConfigReader(fields, ledger).read()
        if config is None:
            ledger.raise_if_any()
            raise AssertionError("a configuration was dropped without a reason")
        if check_base:
            self._check_base(config.base_model, ledger)
        try:
            with safe_open(weights_path, framework="pt") as file:
                weights = _TensorReader(file, config, self._geometry, self._limits, ledger).read()
        except SafetensorError as error:
            raise InvalidUpload(f"{WEIGHTS_NAME} is damaged or cut off: {error}") from error
        ledger.raise_if_any()
        return PeftAdapter(AdapterWeights(weights), config.base_model)

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
            ledger.add(
                f"trained on {recorded!r}, but the base served here is {self._base_names[0]!r}; "
                "if that is the same model under another name, upload with check_base=false"
            )


class _TensorReader:
    """Applies one weights file to one geometry; every fault goes to the ledger."""

    def __init__(
        self,
        file: Any,
        config: PeftConfig,
        geometry: ModelGeometry,
        limits: AdapterLimits,
        ledger: Ledger,
    ) -> None:
        self._file = file
        self._config = config
        self._geometry = geometry
        self._limits = limits
        self._ledger = ledger

    def read(self) -> dict[ModuleKey, LoRAPair]:
        weights: dict[ModuleKey, LoRAPair] = {}
        for linear in self._linears().values():
            pairs = self._read_linear(linear)
            if not weights.keys().isdisjoint(pairs):
                self._ledger.add("given both fused and split", linear.key.module)
            weights.update(pairs)
        if not weights and not self._ledger:
            self._ledger.add(f"{WEIGHTS_NAME} holds no LoRA tensors")
        return weights

    def _linears(self) -> Mapping[str, _Linear]:
        names = self._file.keys()
        if len(names) > self._limits.max_tensors:
            self._ledger.add(f"{len(names)} tensors; at most {self._limits.max_tensors} are read")
            return {}
        linears: dict[str, _Linear] = {}
        for name in sorted(names):
            parsed = parse_key(name)
            if isinstance(parsed, str):
                self._ledger.add(parsed, name)
                continue
            key, side = parsed
            linears.setdefault(key.module, _Linear(key)).names[side] = name
        return linears

    def _read_linear(self, linear: _Linear) -> dict[ModuleKey, LoRAPair]:
        """Return the linear's pairs, or nothing after a fault."""
        key = linear.key
        if missing := {"A", "B"} - linear.names.keys():
            self._ledger.add(f"has no lora_{missing.pop()}", key.module)
            return {}
        if key.layer >= self._geometry.num_layers:
            self._ledger.add(f"the base has only {self._geometry.num_layers} layers", key.module)
            return {}
        try:
            if not self._config.targets.covers(key.module, key.layer):
                self._ledger.add(
                    "has tensors, but target_modules and the fields beside it leave it out, so "
                    "PEFT would not load them",
                    key.module,
                )
                return {}
            rank, scale = self._config.rank_of(key.module), self._config.scale_of(key.module)
        except PatternError as error:
            self._ledger.add(f"a pattern of the configuration {error}")
            return {}
        if not self._has_shapes(linear, rank):
            return {}
        return self._load(linear, scale)

    def _has_shapes(self, linear: _Linear, rank: int) -> bool:
        """Check both tensors by the header alone."""
        a_shape, a_dtype = self._header(linear.names["A"])
        b_shape, b_dtype = self._header(linear.names["B"])
        for name, dtype in ((linear.names["A"], a_dtype), (linear.names["B"], b_dtype)):
            if dtype not in _DTYPES:
                self._ledger.add(f"is {dtype}; only float32, float16 and bfloat16 are read", name)
        expected_in = self._geometry.in_features(linear.key.projections[0])
        expected_out = sum(self._geometry.out_features(p) for p in linear.key.projections)
        faults = [
            f"{side} is {list(shape)} where the configuration and the base need {list(expected)}"
            for side, shape, expected in (
                ("lora_A", a_shape, (rank, expected_in)),
                ("lora_B", b_shape, (expected_out, rank)),
            )
            if shape != expected
        ]
        if rank > self._limits.max_rank:
            faults.append(f"rank {rank} is above the limit of {self._limits.max_rank}")
        for fault in faults:
            self._ledger.add(fault, linear.key.module)
        return not faults and a_dtype in _DTYPES and b_dtype in _DTYPES

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        view = self._file.get_slice(name)
        return tuple(view.get_shape()), str(view.get_dtype())

    def _load(self, linear: _Linear, scale: float) -> dict[ModuleKey, LoRAPair]:
        a = self._file.get_tensor(linear.names["A"])
        b = self._file.get_tensor(linear.names["B"])
        peak_a, peak_b = _peak(a), _peak(b)
        for name, peak in ((linear.names["A"], peak_a), (linear.names["B"], peak_b)):
            if peak is None:
                self._ledger.add("holds NaN or infinity", name)
        if peak_b is not None and peak_b * abs(scale) > _FLOAT32_MAX:
            self._ledger.add(f"times the scale {scale:g} passes float32", linear.names["B"])
        pairs: dict[ModuleKey, LoRAPair] = {}
        row = 0
        for projection in linear.key.projections:
            rows = self._geometry.out_features(projection)
            # One file cannot hold one tensor under two names, so later slices get a copy of A.
            own_a = a if row == 0 else a.clone()
            pairs[linear.key.layer, projection] = LoRAPair(own_a, b[row : row + rows], scale)
            row += rows
        return pairs


def _peak(tensor: torch.Tensor) -> float | None:
    """Return the largest magnitude in `tensor`, None if it holds NaN or infinity."""
    low, high = tensor.aminmax()
    peak = max(abs(float(low)), abs(float(high)))
    return peak if torch.isfinite(torch.stack((low, high))).all() else None
