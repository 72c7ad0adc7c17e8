"""`loraplex bench`: plans, traces, figures, and runs against real servers."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
from itertools import islice, pairwise

import pytest
from typer.testing import CliRunner

from loraplex import AsyncClient, UsageError
from loraplex.cli.app import app
from loraplex.cli.bench.load import LoadGenerator, Outcome
from loraplex.cli.bench.plan import Ask, Lengths, Popularity, arrival_times
from loraplex.cli.bench.prompts import PROBES, PromptMaker
from loraplex.cli.bench.report import fairness, figures, spread
from loraplex.cli.bench.trace import read_trace

ONE = Popularity(["base"], 0.0)


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gaps_have_the_mean_and_the_variation_that_were_asked_for(cv):
    times = list(islice(arrival_times(10.0, cv, random.Random(0)), 40_000))
    gaps = [b - a for a, b in pairwise(times)]
    assert times[0] == 0
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.05)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.05, abs=1e-6)


def test_popularity_follows_zipf():
    rng, models = random.Random(0), ["a", "b", "c", "d"]
    drawn = [Popularity(models, 1.0).draw(rng) for _ in range(20_000)]
    assert drawn.count("a") / drawn.count("b") == pytest.approx(2.0, rel=0.1)
    assert drawn.count("a") / drawn.count("d") == pytest.approx(4.0, rel=0.1)
    even = [Popularity(models, 0.0).draw(rng) for _ in range(20_000)]
    assert even.count("a") / even.count("d") == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("text", ["", "x", "0", "9-3", "-5", "1-2-3", "1.5"])
def test_a_length_that_is_none_is_refused(text):
    with pytest.raises(UsageError):
        Lengths.parse(text)
    assert Lengths.parse("7") == Lengths(7, 7)


def test_prompts_have_the_tokens_that_words_took():
    # A tokenizer with one token in front and two for each word.
    prompts = PromptMaker.fit((1 + 2 * PROBES[0], 1 + 2 * PROBES[1]))
    assert len(prompts.make(101, random.Random(0)).split()) == 50
    assert len(prompts.make(1, random.Random(0)).split()) == 1


TRACES = {
    "a.csv": "arrival,prompt_len,output_len,adapter\n12.5,30,40,sql\n10,10,20,\n",
    "a.jsonl": (
        '{"arrival": 12.5, "prompt_len": 30, "output_len": 40, "adapter": "sql"}\n\n'
        '{"arrival": 10, "prompt_len": 10, "output_len": 20}\n'
    ),
    "azure.csv": (
        "TIMESTAMP,ContextTokens,GeneratedTokens,adapter\n"
        "2023-11-16 18:15:46.6805900,10,20,\n2023-11-16 18:15:49.1805900,30,40,sql\n"
    ),
}


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_is_played_in_order_from_zero(name, tmp_path):
    path = tmp_path / name
    path.write_text(TRACES[name])
    asks = read_trace(path, ONE, 5.0, random.Random(0))
    assert asks == [Ask(0.0, "base", 10, 20), Ask(pytest.approx(0.5), "sql", 30, 40)]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "arrival,prompt_len\n1,2\n", "line 2: no output_len"),
        ("a.csv", "arrival,prompt_len,output_len\n1,two,3\n", "line 2: .*'two'"),
        ("a.csv", "arrival,prompt_len,output_len\nnoon,2,3\n", "line 2: .*'noon'"),
        ("a.csv", "arrival,prompt_len,output_len\n", "has no requests"),
        ("a.jsonl", "[]\n", "line 1: no JSON object"),
        ("a.jsonl", "{\n", "line 1: "),
    ],
)
def test_a_trace_that_is_none_says_where(name, text, told, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError, match=told):
        read_trace(path, ONE, 1.0, random.Random(0))
    with pytest.raises(UsageError, match="cannot read the trace"):
        read_trace(tmp_path / "absent.csv", ONE, 1.0, random.Random(0))


def outcome(model: str, due_s: float, first_s: float, error: str = "") -> Outcome:
    return Outcome(
        Ask(due_s, model, 5, 3),
        due_s,
        due_s,
        first_s=None if error else first_s,
        end_s=first_s + 0.2,
        num_prompt=5,
        num_output=3,
        gaps_s=[0.1, 0.1],
        error=error,
    )


def test_figures_count_from_when_a_request_was_due():
    done = [outcome("a", 0.0, 0.1), outcome("a", 1.0, 1.3), outcome("b", 1.5, 9.0, "queue_full")]
    told = figures(done)
    assert told["failed"] == {"queue_full": 1}
    assert told["ttft_ms"] == {"mean": 200, "p50": 100, "p90": 300, "p95": 300, "p99": 300} | {
        "max": 300
    }
    assert told["per_token_ms"]["mean"] == 100
    assert told["whole_ms"]["max"] == 500
    assert told["output_tokens"] == 6
    assert told["by_model"]["b"] == {
        "requests": 1,
        "failed": 1,
        "output_tokens": 0,
        "ttft_ms": None,
    }


def test_percentiles_are_of_the_nearest_rank():
    assert spread([k / 1000 for k in range(1, 101)])["p99"] == 99
    assert spread([]) is None


def test_fairness_falls_when_one_model_waits_for_all():
    even = fairness([outcome(name, 0.0, 0.1) for name in "abcd"])
    assert even == {"models": 4, "jain_ttft": 1.0, "worst_to_best_ttft": 1.0}
    skewed = fairness([*(outcome(name, 0.0, 0.0) for name in "abc"), outcome("d", 0.0, 1.0)])
    assert skewed["jain_ttft"] == 0.25
    assert fairness([outcome("a", 0.0, 0.1)]) is None


async def test_an_open_loop_does_not_wait_for_a_server_that_stalls(make_pieces):
    """Three requests due at once, served one after the other: the later ones count their wait."""
    import httpx

    turn = asyncio.Lock()
    under_way, most = 0, 0

    async def stalling(request: httpx.Request) -> httpx.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        async with turn:
            await asyncio.sleep(0.05)
        under_way -= 1
        chunk = {"id": "c", "object": "t", "created": 1, "model": "m"}
        chunk["choices"] = [{"index": 0, "text": "x"}]
        return httpx.Response(200, content=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")

    async with httpx.AsyncClient(transport=httpx.MockTransport(stalling)) as http:
        client = AsyncClient(http_client=http, max_retries=0)
        load = LoadGenerator(client, PromptMaker(0, 1), 0)
        outcomes = await load.run_open([Ask(0.0, "m", 2, 1)] * 3)
        assert most == 3
        waits = sorted(o.first_s - o.due_s for o in outcomes)
        assert waits[2] >= 0.15  # all three turns, although it was served in one
        most = 0
        await load.run_closed(iter([Ask(None, "m", 2, 1)] * 3), concurrency=1)
        assert most == 1


@pytest.fixture
def bench(tiny_server):
    def run(*args: str):
        command = ["--base-url", tiny_server.base_url, "bench", "--warmup", "1", *args]
        return CliRunner().invoke(app, command)

    return run


LENGTHS = ("--input-len", "20-40", "--output-len", "4")


@pytest.mark.parametrize(
    "how", [("--concurrency", "3"), ("--rate", "200"), ("--rate", "200", "--cv", "2")]
)
def test_a_run_ends_with_a_table_and_one_line_of_json(bench, how):
    result = bench("--requests", "12", *LENGTHS, *how)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert (told["requests"], told["failed"], told["output_tokens"]) == (12, {}, 48)
    assert 20 <= told["prompt_tokens"] / 12 <= 40
    assert "time to first token" in result.stdout
    assert told["options"]["models"] == ["tiny"]


def test_a_trace_is_played_whole_and_drawn(bench, tmp_path):
    trace, picture = tmp_path / "t.csv", tmp_path / "p.png"
    rows = [f"{i / 100},20,{2 + i}," for i in range(6)]
    trace.write_text("\n".join(["arrival,prompt_len,output_len,adapter", *rows]))
    result = bench("--trace", str(trace), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["output_tokens"] == sum(range(2, 8))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_requests_that_fail_are_told_by_kind_and_end_in_an_error(bench):
    result = bench("--requests", "2", "--input-len", "2000", "--output-len", "4")
    assert result.exit_code == 1
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["failed"] == {"context_length_exceeded": 2}
    assert told["ttft_ms"] is None
    assert "2 x context_length_exceeded" in result.stdout


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--rate", "1", "--trace", "x.csv"), "give --rate or --trace"),
        (("--model", "nobody-*"), "no model is like 'nobody-*'"),
        (("--model", "tinny"), "did you mean tiny?"),
        (("--input-len", "many"), "a length is a number"),
        (("--plot", "/absent/p.png"), "there is no folder"),
        (("--plot", "p.txt"), "writes .png, .svg or .pdf"),
    ],
)
def test_options_that_cannot_work_are_refused_before_any_load(bench, args, told):
    result = bench(*args)
    assert result.exit_code == 1
    assert told in result.stderr
