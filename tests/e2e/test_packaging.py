"""The wheel holds what it should and installs where nothing else is."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "loraplex",
    "loraplex_server",
    "loraplex_scheduler",
    "loraplex_memory",
    "loraplex_kernels",
)


def run(*command: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=280, **kwargs
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    # The build requirements are part of the test environment: no second download of them.
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=ROOT)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_five_packages_and_their_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == set(PACKAGES)
    assert {f"loraplex_kernels/csrc/{n}" for n in ("lora.c", "packing.c", "vectors.h")} <= {*names}
    assert all(f"{package}/py.typed" in names for package in PACKAGES)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdk_alone_imports_in_a_clean_environment_without_torch(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", wheel, "-c", constraints)
    code = "import loraplex, sys; loraplex.Client(); assert 'torch' not in sys.modules"
    run(python, "-c", code, cwd=tmp_path)
    missing = subprocess.run(
        [tmp_path / "env" / "bin" / "loraplex", "models"], capture_output=True, text=True
    )
    assert missing.returncode == 1
    assert "pip install 'loraplex[cli]'" in missing.stderr


def test_the_engine_core_imports_with_nothing_but_its_own_dependencies():
    """Offline, and with every web and database library forbidden."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FORBIDDEN:
            raise ImportError(f"the engine core must not import {name}")
FORBIDDEN = {"fastapi", "starlette", "uvicorn", "sqlalchemy", "prometheus_client", "pydantic"}
sys.meta_path.insert(0, Refuse())
import loraplex_server.engine.core, loraplex_server.engine.process, loraplex_server.model.loader
import loraplex_server.build
"""
    run(sys.executable, "-c", code)
