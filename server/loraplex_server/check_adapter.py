"""`python -m loraplex_server.check_adapter DIR`; also `loraplex adapters check DIR`. No server."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from loraplex_server.adapters.archive import extract_adapter
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.checks import AdapterChecks
from loraplex_server.adapters.errors import AdapterError
from loraplex_server.adapters.folder_reader import FolderReader
from loraplex_server.adapters.record import AdapterLimits
from loraplex_server.adapters.report import ReadingReport, ReportEntry
from loraplex_server.adapters.validation import ServedForm, Validation, validate
from loraplex_server.build import resolve_facts
from loraplex_server.config import Config, ConfigError
from loraplex_server.config_sources import load_config
from loraplex_server.flags import flag_of, given_flags
from loraplex_server.model.errors import ModelError

_ABOUT = (
    "Read an adapter as the server would, without one, and tell what becomes of every field and "
    "tensor. Exit status: 0 it would be served exactly, 1 it would be refused, 2 asked wrongly."
)
#: Settings of the server that decide what it accepts.
_SETTINGS: Final = ("config", "model", "served_model_name", "page_tokens", "max_adapter_rank")
_ORDER: Final = ("refused", "folded", "applied", "no effect")
_TITLES: Final = {
    "refused": "REFUSED",
    "folded": "FOLDED, exactly",
    "applied": "APPLIED as it is",
    "no effect": "NO EFFECT on any output",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Check one folder or archive and return the exit code."""
    asked = _parser().parse_args(argv)
    try:
        config = load_config(given_flags(asked, _SETTINGS), os.environ, needs_files=False)
        answer = _check(config, asked.path, check_base=not asked.skip_base_check)
    except ConfigError as error:
        return _fail(error, 2)
    except (ModelError, AdapterError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130
    if asked.json:
        _tell([json.dumps(answer.to_json(), indent=2)])
    else:
        _tell([_printable(line) for line in _lines(answer)])
    return 0 if answer.form is not None else 1


def _tell(lines: Sequence[str]) -> None:
    """Write lines; whoever reads only the first ones, as `head` does, makes that no error."""
    try:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at the end, and would tell of the same.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loraplex adapters check", description=_ABOUT)
    parser.add_argument("path", type=Path, metavar="PATH", help="a PEFT folder, or an archive")
    parser.add_argument("--json", action="store_true", help="write the whole account as JSON")
    parser.add_argument(
        "--skip-base-check",
        action="store_true",
        help="take an adapter whose config names another base: it is the same, renamed",
    )
    for name in _SETTINGS:
        parser.add_argument(flag_of(name), help="as of `loraplex serve`")
    return parser


def _fail(error: Exception, code: int) -> int:
    sys.stderr.write(f"loraplex adapters check: {error}\n")
    return code


def _check(config: Config, path: Path, *, check_base: bool) -> Validation:
    facts = resolve_facts(config)
    limits = AdapterLimits(
        max_rank=config.max_adapter_rank, max_upload_bytes=config.max_upload_bytes
    )
    names = (facts.base_name, facts.source.name, str(facts.source.path), config.model or "")
    base = BaseModel.open(facts.source, facts.spec)
    reader = FolderReader(base, tuple(name for name in names if name), limits)
    checks = AdapterChecks(reader, facts.layout, at_stage=lambda stage: None)
    if path.is_dir():
        return validate(checks, path, check_base=check_base)
    with tempfile.TemporaryDirectory() as folder:
        extract_adapter(path, Path(folder), limits)
        return validate(checks, Path(folder), check_base=check_base)


def _lines(answer: Validation) -> Iterator[str]:
    if answer.form is None:
        yield "This adapter would be refused:"
        yield from (f"  - {reason}" for reason in answer.reasons)
    else:
        yield "This adapter would be served exactly."
        yield from _form_lines(answer.form)
    if answer.report is not None:
        yield from _report_lines(answer.report)


def _printable(line: str) -> str:
    """Names in the file are text, never an order to the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in line)


def _form_lines(form: ServedForm) -> Iterator[str]:
    how = "as uploaded" if form.is_native else "folded"
    rows = {
        "id": form.adapter_id,
        "base model": form.base_model or "not named",
        "largest rank": f"{form.rank_max}, {how}" if form.rank_max else "no LoRA",
        "modules": ", ".join(form.target_modules) or "none",
        "parts": ", ".join(form.parts) or "none",
        "virtual tokens": form.num_virtual_tokens or "none",
        "size": f"{form.size_bytes:,} bytes, {how}",
        "pool pages": form.pool_pages,
        "self-test": f"largest relative error {form.self_test_error:.1e}",
    }
    yield from (f"  {label:<15} {value}" for label, value in rows.items())


def _report_lines(report: ReadingReport) -> Iterator[str]:
    for verdict in _ORDER:
        entries = [entry for entry in report.entries if entry.verdict == verdict]
        lines = [*_field_lines(entries), *_tensor_lines(entries)]
        if lines:
            yield f"\n{_TITLES[verdict]}"
        yield from (f"  {line}" for line in lines)


def _field_lines(entries: Sequence[ReportEntry]) -> Iterator[str]:
    """Yield fields, those of one detail on one line."""
    names: dict[str, list[str]] = {}
    for entry in entries:
        if entry.kind == "field":
            names.setdefault(entry.detail, []).append(entry.subject)
    for detail, subjects in names.items():
        yield ", ".join(subjects) + (f": {detail}" if detail else "")


def _tensor_lines(entries: Sequence[ReportEntry]) -> Iterator[str]:
    """Yield tensors, those of the same name in all layers on one line."""
    counts = Counter(
        (_without_layer(entry.subject), entry.detail) for entry in entries if entry.kind == "tensor"
    )
    for (name, detail), count in counts.items():
        yield name + (f" ({count})" if count > 1 else "") + (f": {detail}" if detail else "")


def _without_layer(name: str) -> str:
    return re.sub(r"\blayers\.\d+\.", "layers.*.", name.removeprefix("base_model.model."))


if __name__ == "__main__":
    sys.exit(main())
