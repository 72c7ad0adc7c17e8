"""`loraplex.push`: a PEFT model straight from training to the server. Imports no PEFT."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Protocol, TypeAlias, Unpack, runtime_checkable

from loraplex.adapter_options import RegisterOptions
from loraplex.client import Client
from loraplex.errors import UsageError
from loraplex.types import Adapter


@runtime_checkable
class AdaptedModel(Protocol):
    """What is asked of a `peft.PeftModel`."""

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configurations of its adapters, by name."""
        ...

    def save_pretrained(self, save_directory: str, **options: Any) -> Any:
        """Write adapters into a folder."""
        ...


Pushable: TypeAlias = AdaptedModel | str | os.PathLike[str]


def push(
    model: Pushable,
    name: str,
    *,
    adapter_name: str | None = None,
    client: Client | None = None,
    **options: Unpack[RegisterOptions],
) -> Adapter:
    """Register an adapter under a name; requests can use it when this returns.

    In an asynchronous program: `await asyncio.to_thread(loraplex.push, model, name)`.

    Args:
        model: A `PeftModel`, or a folder or archive that PEFT wrote.
        name: What requests will call it.
        adapter_name: Which of the model's adapters; default: the active one. Of a folder, the one
            that `save_pretrained` put into a folder of that name.
        client: Whom to ask; default: a `Client` for LORAPLEX_BASE_URL and LORAPLEX_API_KEY.
        options: The fields of `RegisterOptions`; `replace=True` makes it a new version of the name.

    Raises:
        UsageError: The model has no such adapter.
        AdapterFilesError: There is no adapter in the folder.
        ConflictError: The name holds other content, which is not to be replaced.
        UnprocessableEntityError: The server cannot serve it exactly; `reasons` says why.
    """
    if client is None:
        with Client() as own:
            return push(model, name, adapter_name=adapter_name, client=own, **options)
    if isinstance(model, str | os.PathLike):
        folder = saved_folder(Path(model), adapter_name)
        return client.adapters.push(folder, name=name, **options)
    if not isinstance(model, AdaptedModel):
        raise UsageError(
            f"a {type(model).__name__} has no adapters: give the PeftModel that get_peft_model "
            "returned, or the folder it was saved to"
        )
    with tempfile.TemporaryDirectory(prefix="loraplex-push-") as scratch:
        chosen = _chosen_adapter(model, adapter_name)
        model.save_pretrained(scratch, selected_adapters=[chosen], safe_serialization=True)
        return client.adapters.push(saved_folder(Path(scratch), chosen), name=name, **options)


def saved_folder(path: Path, adapter_name: str | None) -> Path:
    """Return where `save_pretrained(path)` put an adapter: that of the name "default" in `path`."""
    if adapter_name is None or adapter_name == "default":
        return path
    return path / adapter_name


def _chosen_adapter(model: AdaptedModel, adapter_name: str | None) -> str:
    known = sorted(model.peft_config)
    if adapter_name is None:
        active = getattr(model, "active_adapters", known)
        names = list(active() if callable(active) else active)
        if len(names) != 1:
            raise UsageError(f"say which adapter with adapter_name=: one of {', '.join(known)}")
        return str(names[0])
    if adapter_name not in known:
        raise UsageError(f"the model has no adapter {adapter_name!r}, but {', '.join(known)}")
    return adapter_name
