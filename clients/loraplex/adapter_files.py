"""What `adapters.push` sends: the two files of a PEFT folder, or one archive of it.

The files are found, measured and named here, and read only while they are sent. What is inside
them is the server's to judge; refused here is only what could never be sent.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from loraplex.errors import AdapterFilesError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")

_PICKLE_PROBLEM = (
    f"has {PICKLE_NAME} but no {WEIGHTS_NAME}; a pickle file can run code when it is opened, so "
    "pickle files are refused: save the adapter again with "
    "model.save_pretrained(folder, safe_serialization=True)"
)


@dataclass(frozen=True)
class FilePart:
    """One file of the upload.

    Attributes:
        field: The multipart field, "files" or "archive".
        path: Where it is read from.
        filename: What the server is told it is called.
        size_bytes: Its size when it was found; exactly this much is sent.
    """

    field: str
    path: Path
    filename: str
    size_bytes: int


def find_parts(path: Path) -> list[FilePart]:
    """Return the files to send for a folder or an archive.

    Raises:
        AdapterFilesError: Nothing there, files missing, pickled weights, or not an archive.
    """
    if path.is_dir():
        return _folder_parts(path)
    if not path.exists():
        raise AdapterFilesError(path, "no such file or folder")
    if path.name.endswith(ARCHIVE_SUFFIXES):
        return [_part("archive", path, path.name)]
    if path.name in (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME):
        raise AdapterFilesError(path, f"push the folder it is in: {path.parent}")
    raise AdapterFilesError(path, f"neither a folder nor one of {', '.join(ARCHIVE_SUFFIXES)}")


def default_name(path: Path) -> str:
    """Return the adapter name that a path suggests: the folder's, or the archive's stem."""
    name = Path(os.path.abspath(path)).name  # noqa: PTH100 - resolve() would follow links
    for suffix in (*ARCHIVE_SUFFIXES, ".tar"):
        name = name.removesuffix(suffix) if path.is_file() else name
    return name


def _folder_parts(folder: Path) -> list[FilePart]:
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
    if not missing:
        return [_part("files", folder / name, name) for name in (CONFIG_NAME, WEIGHTS_NAME)]
    if missing == [WEIGHTS_NAME] and (folder / PICKLE_NAME).is_file():
        raise AdapterFilesError(folder, _PICKLE_PROBLEM)
    problem = f"has no {' and no '.join(missing)}"
    inner = sorted(found.parent for found in folder.glob(f"*/{CONFIG_NAME}"))
    if inner:
        problem += f"; did you mean {inner[-1]}?"
    else:
        problem += "; a PEFT adapter folder has both, as model.save_pretrained(folder) writes them"
    raise AdapterFilesError(folder, problem)


def _part(field: str, path: Path, filename: str) -> FilePart:
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise AdapterFilesError(path, error.strerror or str(error)) from error
    if not size_bytes:
        raise AdapterFilesError(path, "the file is empty")
    return FilePart(field, path, filename, size_bytes)
