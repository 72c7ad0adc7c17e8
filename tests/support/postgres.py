"""A PostgreSQL server of a test's own, where its programs are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DEBIAN = Path("/usr/lib/postgresql")


def find_programs() -> Path | None:
    """Return the folder of `initdb` and `postgres`, if they are anywhere."""
    if (initdb := shutil.which("initdb")) is not None:
        return Path(initdb).resolve().parent
    found = sorted(_DEBIAN.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


@contextmanager
def running_postgres(programs: Path, folder: Path) -> Iterator[str]:
    """Run a server on a Unix socket in `folder`, and yield SQLAlchemy's URL of its database."""
    data, user = folder / "data", _unprivileged_user()
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)
    options = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    make = [programs / "initdb", "-D", data, "-U", "test", "-A", "trust", "--no-sync", "-E", "UTF8"]
    subprocess.run(make, check=True, capture_output=True, cwd=folder, **options)
    command = [programs / "postgres", "-D", data, "-k", folder, "-h", "", "-c", "fsync=off"]
    log = (folder / "log").open("wb")
    server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **options)
    try:
        ready = [programs / "pg_isready", "-h", folder, "-t", "30"]
        for _ in range(300):
            if subprocess.run(ready, check=False, capture_output=True).returncode == 0:
                break
            assert server.poll() is None, (folder / "log").read_text()
        yield f"postgresql://test@/postgres?host={folder}"
    finally:
        server.terminate()
        server.wait(timeout=60)
        log.close()


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
