"""A PostgreSQL server of a test's own, where its programs are installed."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import children_of

_DEBIAN = Path("/usr/lib/postgresql")


def why_no_postgres() -> str | None:
    """Return what is missing to run one, None if nothing is."""
    if find_programs() is None:
        return "no PostgreSQL: neither `initdb` in PATH nor in /usr/lib/postgresql/*/bin"
    if importlib.util.find_spec("psycopg") is None:
        return "no driver for PostgreSQL: psycopg is not installed"
    return None


def find_programs() -> Path | None:
    """Return the folder of `initdb` and `postgres`, if they are anywhere."""
    if (initdb := shutil.which("initdb")) is not None:
        return Path(initdb).resolve().parent
    found = sorted(_DEBIAN.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


@contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """Run a server over an empty database until the block ends.

    In a folder of its own below /tmp: pytest closes those that it makes to all other users, and
    does so again whenever somebody else starts it.
    """
    with tempfile.TemporaryDirectory(prefix="loraplex-postgres-") as folder:
        server = PostgresServer(Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.stop()


class PostgresServer:
    """On a Unix socket in its folder; may be stopped and started again over the same data.

    Attributes:
        url: SQLAlchemy's, of its database.
    """

    def __init__(self, folder: Path) -> None:
        programs = find_programs()
        assert programs is not None, why_no_postgres()
        self.url = f"postgresql://test@/postgres?host={folder}"
        self._programs, self._folder = programs, folder
        user = _unprivileged_user()
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
        self._options = {"user": user.pw_uid, "group": user.pw_gid} if user else {}
        self._options |= {"extra_groups": []} if user else {}
        self._process: subprocess.Popen[bytes] | None = None
        make = [programs / "initdb", "-D", folder / "data", "-U", "test", "-A", "trust"]
        make += ["--no-sync", "-E", "UTF8"]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, **self._options)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [self._programs / "postgres", "-D", self._folder / "data", "-k", self._folder]
        command += ["-h", "", "-c", "fsync=off"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self._folder, **self._options
            )
        ready = [self._programs / "pg_isready", "-h", self._folder]
        for _ in range(600):
            if subprocess.run(ready, check=False, capture_output=True).returncode == 0:
                return
            assert self._process.poll() is None, (self._folder / "log").read_text()
            time.sleep(0.1)
        raise AssertionError(f"not ready: {(self._folder / 'log').read_text()}")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let it keep its connections and answer nothing, until the block ends."""
        assert self._process is not None, "it runs"
        # Its first process before the others, so that it makes no more of them.
        self._process.send_signal(signal.SIGSTOP)
        workers = children_of(self._process.pid)
        try:
            for pid in workers:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in (*workers, self._process.pid):
                os.kill(pid, signal.SIGCONT)

    def stop(self) -> None:
        """Stop it at once, as an administrator would ("fast": whoever is connected is cut off)."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(timeout=60)
        finally:
            self._process = None


def _unprivileged_user() -> pwd.struct_passwd | None:
    """Return whom to run as where we are root, which PostgreSQL refuses to be."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return None
