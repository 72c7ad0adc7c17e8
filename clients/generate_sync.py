"""Write the synchronous half of the SDK from the asynchronous one.

The two differ in `async`, `await` and a few names, so only one is written by hand: for each
`async_NAME.py` and each file of `async_resources/`, this writes `NAME.py` and `resources/`. What
both share without I/O is in neither. A test sees that nobody forgot to run it.

    python clients/generate_sync.py           # write
    python clients/generate_sync.py --check   # exit with 1 if a file is not as it would be written
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SDK = Path(__file__).resolve().parent / "loraplex"

#: In this order. Words that begin with "Async" lose it; the others are names of two libraries.
RULES = [
    (r"an `async with`", "a `with`"),
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAsyncGenerator\[(\w+), None\]", r"Generator[\1, None, None]"),
    (r"\b(Default)?Async(?=[A-Z])", r"\1"),
    (r"\b__a(enter|exit|iter|next)__\b", r"__\1__"),
    (r"\b(?:anext)\(", "next("),
    (r"\ba(close|read|stream|iter_bytes)\(", r"\1("),
    (r"\bloraplex\.async_", "loraplex."),
    (r"\basyncio\b", "time"),
    (r"\bThe asynchronous client\b", "The synchronous client"),
]
#: A loop that only yields is `yield from` where nothing is awaited.
FINISH = ["check", "--quiet", "--fix", "--unsafe-fixes", "--select", "I,UP028"]


def main() -> int:
    stale = []
    for source in sources():
        target, text = generated(source)
        if target.exists() and target.read_text(encoding="utf-8") == text:
            continue
        stale.append(target)
        if "--check" not in sys.argv:
            target.parent.mkdir(exist_ok=True)
            target.write_text(text, encoding="utf-8")
    for target in stale:
        print(f"{'not as generated' if '--check' in sys.argv else 'wrote'}: {target}")
    return 1 if stale and "--check" in sys.argv else 0


def sources() -> list[Path]:
    """Return the files that are written by hand."""
    return sorted([*SDK.glob("async_*.py"), *SDK.glob("async_resources/*.py")])


def generated(source: Path) -> tuple[Path, str]:
    """Return the path and the text of what a source becomes."""
    name = str(source.relative_to(SDK))
    target = SDK / name.removeprefix("async_")
    text = source.read_text(encoding="utf-8")
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text)
    head = f"# Written by clients/generate_sync.py from {name}: change that, and run it.\n"
    return target, ruff(["format", "--quiet"], ruff(FINISH, head + text, target), target)


def ruff(command: list[str], text: str, target: Path) -> str:
    """Pass a text through ruff, as if it were the file."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(target), "-"],
        input=text,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
