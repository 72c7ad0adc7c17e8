"""One page's blocks, run in order in one shell and one Python, as a reader would type them."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from tests.support.doc_pages import Block

#: A bound, not a measure: machines that run tests are busy.
BLOCK_TIMEOUT_S = 240.0

# Both read the path of a block from standard input, run it where the last one left off, and write
# its status to the descriptor of their first argument. The shell leaves its variables and folder
# to Python. `errexit` ends the shell within a block, so that the descriptor closes.
# HTTP errors are failures of curl here, which has two options for it and refuses both at once.
_SHELL = r"""
set -euo pipefail
curl() {
    if [[ " $* " =~ \ (--fail.*|-[a-zA-Z]*f[a-zA-Z]*)\  ]]; then command curl "$@"
    else command curl --fail-with-body "$@"; fi
}
while IFS= read -r block; do
    . "$block" </dev/null
    env -0 >"$HOME/.environment"
    echo 0 >&"$STATUS"
done
"""

_PYTHON = """
import os, sys, traceback
descriptor = int(os.environ["STATUS"])
names = {"__name__": "__main__"}
for line in sys.stdin:
    path = line.rstrip("\\n")
    lines = open(os.path.expanduser("~/.environment"), "rb").read().split(b"\\0")
    os.environb.update(line.split(b"=", 1) for line in lines if line)
    os.chdir(os.environ["PWD"])
    status = 0
    try:
        exec(compile(open(path).read(), path, "exec"), names)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os.write(descriptor, b"%d\\n" % status)
"""


class BlockError(AssertionError):
    """A block of a page failed; the message shows it and what it wrote."""


class _Interpreter:
    """A process that runs blocks one after another, in a process group of its own."""

    def __init__(self, command: list[str], folder: Path, env: dict[str, str], log: Path) -> None:
        self._status, theirs = os.pipe()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**env, "STATUS": str(theirs)},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[theirs],
                start_new_session=True,
            )
        os.close(theirs)

    def run(self, path: Path) -> str:
        """Return why the block failed, or nothing."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{path}\n".encode())
        self._process.stdin.flush()
        # A background job of the block has the descriptor too: the end of the shell is no event
        # on it then, and has to be looked for.
        deadline = time.monotonic() + BLOCK_TIMEOUT_S
        while time.monotonic() < deadline:
            if select.select([self._status], [], [], 0.1)[0]:
                status = os.read(self._status, 16).strip()
                return "" if status == b"0" else "it failed"
            if self._process.poll() is not None:
                return "it failed"
        return f"it did not end within {BLOCK_TIMEOUT_S:g} s"

    def close(self) -> None:
        """End the process and all that blocks left running."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._status)


class DocSession:
    """A shell and a Python for one page. `close` it, or use it as a context."""

    def __init__(self, folder: Path, env: dict[str, str], ports: dict[str, int]) -> None:
        """Start both in `folder`, their working folder and home.

        Args:
            env: their whole environment, but HOME and PWD.
            ports: what stands for the ports that pages write.
        """
        self._folder, self._ports = folder, ports
        self._log = folder / ".output"
        (folder / ".curlrc").write_text("no-progress-meter\nmax-time = 200\n")
        env = {**env, "HOME": str(folder), "PWD": str(folder)}
        (folder / ".environment").write_text(f"PWD={folder}\0")
        self._interpreters = {
            "bash": _Interpreter(["bash", "-c", _SHELL], folder, env, self._log),
            "python": _Interpreter([sys.executable, "-c", _PYTHON], folder, env, self._log),
        }

    def run(self, block: Block) -> None:
        """Run a block.

        Raises:
            BlockError: a command in it failed, or it took too long.
        """
        text = block.text
        for written, port in self._ports.items():
            text = re.sub(rf"\b{written}\b", str(port), text)
        path = self._folder / f".block-{block.line}"
        path.write_text(text)
        start = self._log.stat().st_size
        if problem := self._interpreters[block.language].run(path):
            output = self._log.read_bytes()[start:].decode(errors="replace")
            raise BlockError(f"{block}: {problem}\n\n{text}\n--- it wrote:\n{output[-6000:]}")

    def close(self) -> None:
        """End the shell, the Python and all that they started."""
        for interpreter in self._interpreters.values():
            interpreter.close()

    def __enter__(self) -> DocSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
