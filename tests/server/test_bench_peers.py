"""The comparison with other servers: its requests, its client, its report, and a run of it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server_process import free_port
from tests.support.tiny_models import save_tiny_model

BENCH = Path(__file__).parents[2] / "server/bench"
STUB = Path(__file__).parents[1] / "support/stub_peer.py"


@pytest.fixture
def bench(monkeypatch):
    """Return what imports a module of the folder of benchmarks, which is no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_the_draws_of_a_seed_are_those_that_other_clients_of_this_workload_make(bench):
    work = bench("workload").make_skewed_work(64, 512, 3, alpha=0.3)
    assert [item.adapter for item in work[:8]] == [92, 501, 15, 7, 321, 227, 0, 270]
    assert [(len(i.prompt), i.num_output) for i in work[:3]] == [(69, 36), (51, 64), (113, 12)]
    assert work[0].prompt[:3] == (35884, 23039, 15192)


def test_a_cell_brings_the_lengths_of_its_seed_and_prompts_of_its_own(bench):
    cell = bench("peer_cells").Cell.parse
    base, mixed = cell("32:0").work(1), cell("32:512:0.3").work(1)
    assert [i.num_output for i in base] == [i.num_output for i in mixed]
    assert [len(i.prompt) for i in base] == [len(i.prompt) for i in mixed]
    assert not {i.prompt for i in base} & {i.prompt for i in mixed}


@pytest.mark.parametrize("text", ["1:0", "32:512:0.3", "32:2000:zipf1"])
def test_a_cell_is_read_as_it_is_written(bench, text):
    cells = bench("peer_cells")
    assert cells.Cell.parse(text).name == text
    with pytest.raises(ValueError, match="a cell is"):
        cells.Cell.parse("32")


def test_popular_adapters_by_zipf_are_of_all_ranks(bench):
    work = bench("workload").make_skewed_work(4000, 2000, 1, zipf=1.0)
    counts = [0] * 2000
    for item in work:
        counts[item.adapter] += 1
    popular = sorted(range(2000), key=counts.__getitem__)[-8:]
    assert counts[popular[-1]] > 10 * len(work) / 2000
    assert len({index % 4 for index in popular}) > 1


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def test_events_have_the_time_of_their_last_byte_however_they_were_cut(bench):
    recorded = bench("recorded_response")
    stream = HEAD + chunk(b'data: {"n": 1}\n\ndata: {"n"') + chunk(b": 2}\n\ndata: [DONE]\n\n")
    whole = recorded.RecordedResponse([(0.5, stream)])
    assert whole.events() == [(0.5, {"n": 1}), (0.5, {"n": 2})]
    bytewise = [(float(i), stream[i : i + 1]) for i in range(len(stream))]
    events = recorded.RecordedResponse(bytewise).events()
    assert [event for _, event in events] == [{"n": 1}, {"n": 2}]
    assert events[0][0] < events[1][0] < len(stream)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\nno such adapter", "HTTP 404: no such adapter"),
        (HEAD + chunk(b'data: {"n": 1}\n\n'), "broke off"),
        (HEAD + chunk(b'data: {"error": {"message": "full"}}\n\n'), "full"),
        (b"", "without an answer"),
    ],
)
def test_an_answer_that_is_no_whole_stream_is_an_error(bench, answer, reason):
    recorded = bench("recorded_response")
    with pytest.raises(recorded.ResponseError, match=reason):
        recorded.RecordedResponse([(0.1, answer)]).events()


def test_the_tree_of_a_process_holds_its_children(bench):
    tree = bench("process_tree").ProcessTree
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    child = "s = b'x' * 64_000_000; print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, child], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline()
        assert tree(process.pid).pss_bytes() > 64_000_000
        assert tree(process.pid).cpu_s() > 0
        process.communicate(b"\n")


def record(server: str, cell: str, rate: float, **more: float) -> dict:
    about = {"kind": "cell", "server": server, "cell": cell, "out_tok_s": rate}
    about |= {"other_cpu_share": 0.0, "pss_peak_mb": 100.0, "failed": 0, "mismatched": 0}
    return about | more


def test_the_report_holds_medians_against_the_best_of_the_others(bench):
    report = bench("peer_report")
    records = [record("loraplex", "32:32", rate) for rate in (100.0, 400.0, 300.0)]
    records += [record("vLLM", "32:32", 50.0), record("llama.cpp", "32:32", 75.0)]
    lines = report.render(records).splitlines()
    line = next(line for line in lines if line.startswith("| 32 in flight, 32 adapters"))
    assert (
        line == "| 32 in flight, 32 adapters: ours / best peer | >= 4.0 | 4.00 | llama.cpp | met |"
    )
    assert "| base, 8 in flight: ours / llama.cpp | >= 1.2 | | | not measured |" in lines


def test_decoding_alone_is_held_against_reading_every_weight_once(bench):
    records = [
        record("loraplex", "1:0", 100.0, tpot_p50_ms=10.0),
        {"kind": "machine", "threads": 2, "bytes_per_s": 25e9, "bf16_flops": 1e12},
        {"kind": "machine", "threads": 2, "bytes_per_s": 20e9, "bf16_flops": 1e12},
    ]
    report = bench("peer_report")
    found = report.Findings([*records, {"kind": "environment", "weight_bytes": 200e6}])
    target = next(t for t in report.TARGETS if t.name.startswith("batch 1"))
    value, _ = target.measure(found)
    assert value == pytest.approx(0.8)
    assert target.is_met(value)


def test_the_servers_of_the_docs_are_read_with_all_their_adapters(bench, tmp_path):
    servers = bench("peer_servers")
    text = (BENCH.parents[1] / "docs/benchmarks/cpu.md").read_text()
    (tmp_path / "peers.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    vllm, llama = servers.read_peers(tmp_path / "peers.toml")
    cells = bench("peer_cells").CELLS
    assert [count for count, _ in vllm.groups(cells)] == [512]
    assert [count for count, _ in llama.groups(cells)] == [32, 512]
    command = llama.command_for(2, model=Path("m"), adapters=Path("a"))
    assert command[command.index("--lora") + 1] == "FILES/gguf/a0000.gguf,FILES/gguf/a0001.gguf"
    assert "m" in vllm.command_for(2, model=Path("m"), adapters=Path("a"))


@pytest.mark.slow
def test_a_run_starts_each_server_and_counts_what_went_wrong(bench, tmp_path):
    asked_for = [item.adapter for item in bench("peer_cells").Cell.parse("4:8").work(1)]
    assert asked_for.count(1) > 0
    save_tiny_model(tmp_path / "model")
    ports = free_port(), free_port()
    stub = f"{sys.executable} {STUB}"
    (tmp_path / "peers.toml").write_text(
        f"""
        [[server]]
        name = "vLLM"
        command = "{stub} --port {ports[0]}"
        base_url = "http://127.0.0.1:{ports[0]}"
        load_calls = true
        [[server]]
        name = "llama.cpp"
        command = "{stub} --port {ports[1]} --adapters {{num_adapters}} --lora-field"
        base_url = "http://127.0.0.1:{ports[1]}"
        select = "lora-field"
        starts = [2, 8]
        """
    )
    done = run_script(
        *("--skip-ours", "--peers", tmp_path / "peers.toml", "--model", tmp_path / "model"),
        *("--adapters", tmp_path / "adapters", "--out", tmp_path / "out.jsonl"),
        *("--cells", "4:0", "4:2", "4:8", "--cold", "1", "--repeats", "1"),
        *("--lock", tmp_path / "lock", "--quiet-below", "99"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert not [r for r in records if r["kind"] == "broken"]
    starts = [(r["server"], r["num_registered"]) for r in records if r["kind"] == "start"]
    assert starts == [("vLLM", 8), ("llama.cpp", 2), ("llama.cpp", 8)]
    cells = {(r["server"], r["cell"]): r for r in records if r["kind"] == "cell"}
    assert len(cells) == 6
    assert all(r["completed"] == 8 and r["failed"] == 0 for r in cells.values())
    assert cells["vLLM", "4:8"]["mismatched"] == asked_for.count(1)
    assert cells["llama.cpp", "4:8"]["mismatched"] == 0
    assert "load_call_p50_ms" in cells["vLLM", "4:2"]
    assert "| 4:8 | llama.cpp |" in done.stdout


@pytest.mark.slow
def test_a_server_that_ends_at_once_is_told_of_and_the_others_are_run(tmp_path):
    save_tiny_model(tmp_path / "model")
    (tmp_path / "peers.toml").write_text(
        """
        [[server]]
        name = "vLLM"
        command = "false"
        base_url = "http://127.0.0.1:1"
        """
    )
    done = run_script(
        *("--skip-ours", "--peers", tmp_path / "peers.toml", "--model", tmp_path / "model"),
        *("--cells", "1:0", "--repeats", "1", "--out", tmp_path / "out.jsonl"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "- vLLM: vLLM ended while starting" in done.stdout


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCH / "bench_peers.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
