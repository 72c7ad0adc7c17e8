from __future__ import annotations

import subprocess
import sys

import pytest

# Makes modules fail to import as if they were not installed.
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""
SERVER_SIDE = {
    "torch",
    "transformers",
    "numpy",
    "fastapi",
    "loraplex_server",
    "loraplex_scheduler",
    "loraplex_memory",
    "loraplex_kernels",
}


def run(code: str, blocked: set[str], *args: str) -> subprocess.CompletedProcess[str]:
    script = BLOCK.format(blocked=blocked) + code
    return subprocess.run(
        [sys.executable, "-c", script, *args], capture_output=True, text=True, timeout=60
    )


def test_the_sdk_needs_only_httpx_and_pydantic():
    code = (
        "import loraplex\n"
        "with loraplex.Client() as client: pass\n"
        "assert loraplex.__version__\n"
        f"assert not {SERVER_SIDE!r} & set(sys.modules)\n"
    )
    done = run(code, {"typer", "rich", "click", *SERVER_SIDE})
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_sdk_reads_no_environment():
    code = (
        "import os\n"
        "class Refusing(dict):\n"
        "    def get(self, key, default=None):\n"
        "        assert not key.startswith('LORAPLEX'), key\n"
        "        return super().get(key, default)\n"
        "    __getitem__ = get\n"
        "os.environ = Refusing(os.environ)\n"
        "import loraplex\n"
    )
    done = run(code, set())
    assert (done.returncode, done.stderr) == (0, "")


def test_the_cli_without_its_extra_says_what_to_install():
    done = run("from loraplex.cli.main import main; main()", {"typer"})
    assert done.returncode == 1
    assert done.stderr == "error: the command line needs typer: pip install 'loraplex[cli]'\n"


@pytest.mark.parametrize("command", [("serve",), ("adapters", "check")], ids=" ".join)
def test_commands_without_the_server_say_what_to_install(command):
    code = f"sys.argv = ['loraplex', *{command!r}, '--help']\n"
    code += "from loraplex.cli.main import main; main()"
    hide = (
        "import importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, package=None: (\n"
        "    None if name == 'torch' else real(name, package))\n"
    )
    done = run(hide + code, set())
    assert done.returncode == 1
    assert "no torch): pip install 'loraplex[server]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_cli_imports_nothing_of_the_server():
    code = (
        "sys.argv = ['loraplex', '--version']\n"
        "from loraplex.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as error: assert not error.code\n"
        f"assert not {SERVER_SIDE!r} & set(sys.modules)\n"
    )
    done = run(code, SERVER_SIDE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("loraplex ")


def test_an_unknown_attribute_is_an_error():
    done = run("import loraplex\nloraplex.nothing", set())
    assert "has no attribute 'nothing'" in done.stderr
