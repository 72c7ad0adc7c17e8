"""The command line of the simulator, in this process."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from loraplex_server.simulator.__main__ import main
from loraplex_server.simulator.experiments.registry import EXPERIMENTS


def run(capsys, *args):
    code = main([*args, "--quiet"] if args[0] != "--list" else args)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_list_names_every_experiment(capsys):
    code, out, _ = run(capsys, "--list")
    assert code == 0
    assert all(f"  {name} " in out for name in [*EXPERIMENTS, "run"])


def test_without_a_name_the_list_is_shown(capsys):
    assert main([]) == 0
    assert "loraplex simulate EXPERIMENT" in capsys.readouterr().out


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_and_states_its_parameters_and_seed(name, capsys):
    code, out, err = run(capsys, name, "--quick", "--json", "--seed", "7")
    assert (code, err) == (0, "")
    report = json.loads(out.splitlines()[-1])
    assert report["experiment"] == name
    assert report["parameters"]["seed"] == 7
    assert report["tables"][0]["rows"]


RUN = ("run", "--adapters", "20", "--duration", "2", "--rate", "4", "--json")


@pytest.mark.parametrize(
    "args",
    [
        ["--engine", "slora", "--workload", "slora"],
        ["--workload", "per-adapter", "--cv", "2", "--eviction", "lru"],
        ["--workload", "chameleon", "--hardware", "a40"],
        ["--workload", "multi-turn", "--no-prefix-cache", "--setting", "8B"],
        ["--workload", "lmsys", "--order", "fcfs"],
        ["--replicas", "3", "--router", "round-robin", "--pool-tokens", "60000"],
        ["--promise", "1.0", "--factor", "3"],
    ],
)
def test_a_run_of_ones_own_reports_every_metric(args, capsys):
    code, out, err = run(capsys, *RUN, *args)
    assert (code, err) == (0, "")
    metrics = dict(json.loads(out.splitlines()[-1])["tables"][0]["rows"])
    assert metrics["num_completed"] > 0
    assert metrics["ttft_p99"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--setting", "S6"], "needs 138 GB .* choose a smaller model or larger hardware"),
        (["--workload", "chameleon", "--adapters", "7"], "multiple of 5"),
        (["--engine", "slora", "--order", "fcfs"], "leave the policy options out"),
        (["--workload", "lmsys", "--log", "/nowhere"], "cannot read /nowhere"),
        (["--log", "x"], "--log is for --workload lmsys"),
        (["--duration", "0.01"], "raise --rate or --duration"),
        (["--step-tokens", "8"], "--step-tokens must be at least"),
        (["--workload", "slora", "--skew", "0"], "alpha"),
    ],
)
def test_what_cannot_be_simulated_is_one_line_saying_why(args, message, capsys):
    code, out, err = run(capsys, *RUN, *args)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert re.search(message, err)


@pytest.mark.parametrize("args", [["--rate", "-3"], ["--adapters", "x"], ["--replicas", "0"]])
def test_a_number_out_of_range_is_answered_with_the_range(args, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["run", *args])
    assert stopped.value.code == 2
    assert "of at least" in capsys.readouterr().err


def test_figures_are_drawn_and_the_same_each_time(tmp_path, capsys):
    for folder in ("a", "b"):
        assert run(capsys, "multi-turn", "--quick", "--plots", str(tmp_path / folder))[0] == 0
    drawn = [(tmp_path / folder / "multi-turn.svg").read_bytes() for folder in ("a", "b")]
    assert drawn[0].startswith(b"<?xml")
    assert drawn[0] == drawn[1]


def test_simulating_needs_no_torch_and_no_matplotlib():
    code = (
        "import sys\n"
        "from loraplex_server.simulator.__main__ import main\n"
        "main(['run', '--adapters', '5', '--duration', '1', '--quiet'])\n"
        "assert not {'torch', 'transformers', 'matplotlib', 'fastapi'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_matplotlib_plots_say_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, "adapters", "--quick", "--plots", str(tmp_path))
    assert code == 1
    assert "pip install 'loraplex[simulate]'" in err
