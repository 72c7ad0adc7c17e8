"""The images: linted, and the wheel built from exactly what their builds copy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")
COPY = re.compile(r"^COPY (?!--from)(?:--\S+ )*(.+) (\S+)$", re.MULTILINE)


def run(*command: object, cwd: Path = ROOT) -> None:
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr


def tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed here")
    return found


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name):
    run(tool("hadolint"), "--failure-threshold", "warning", f"docker/{name}")


def test_shellcheck_finds_nothing_in_the_entrypoint():
    run(tool("shellcheck"), "--shell", "sh", "docker/entrypoint.sh")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_a_build_copies_is_in_its_context(name):
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    sources = copied(name)
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), f"{name} copies {source}, which is not there"
        assert f"!{source}" in allowed, f".dockerignore keeps {source} out"


def copied(name: str) -> list[str]:
    text = (ROOT / "docker" / name).read_text()
    return [source for match in COPY.finditer(text) for source in match[1].split()]


def test_the_wheel_of_the_image_is_whole(tmp_path):
    """Built from the copied files alone, it holds the same files as one of the repository."""
    context = tmp_path / "context"
    for source in copied("Dockerfile.cpu"):
        target = context / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, target)
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        tmp_path,
        cwd=context,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}
    folders = (ROOT / "pyproject.toml").read_text().partition("packages = [")[2].partition("]")[0]
    expected = {
        str(path.relative_to((ROOT / folder).parent))
        for folder in re.findall(r'"(.+?)"', folders)
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected


def test_both_images_differ_only_in_what_they_run_on():
    """What is said twice stays the same: the server's environment, the user, the probes."""
    shipped = [
        re.sub(r"^#.*\n|NVIDIA_\S+( \\)?\n?", "", (ROOT / "docker" / name).read_text(), flags=re.M)
        .partition("ARG VERSION")[2]
        .replace("\\", "")
        .split()
        for name in DOCKERFILES
    ]
    assert shipped[0] == shipped[1]
