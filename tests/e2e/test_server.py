"""A real server, the real model, real clients: what people do with it, and what goes wrong."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex import Client, ConflictError, NotFoundError, UnprocessableEntityError
from tests.e2e.conftest import ADAPTERS, EXAMPLES
from tests.support.processes import is_alive
from tests.support.server_process import ServerProcess

pytestmark = pytest.mark.model

BASE = "SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def sdk(server):
    with Client(base_url=server.base_url) as client:
        yield client


@pytest.fixture
def copy_of_pirate(tmp_path):
    """Return a function that writes a changed copy of the pirate adapter."""

    def write(name="copy", change=lambda tensors: tensors, **config):
        folder = tmp_path / name
        folder.mkdir()
        tensors = change(load_file(EXAMPLES / "pirate" / "adapter_model.safetensors"))
        save_file(tensors, folder / "adapter_model.safetensors")
        original = json.loads((EXAMPLES / "pirate" / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(original | config))
        return folder

    return write


# ---- the OpenAI client ---------------------------------------------------------------------


def test_models_lists_the_base_and_every_adapter_with_its_parent(client):
    models = {model.id: model for model in client.models.list()}
    assert set(models) >= {BASE, *ADAPTERS}
    assert models[BASE].parent is None
    assert all(models[name].parent == BASE for name in ADAPTERS)
    assert client.models.retrieve("sql").id == "sql"


def test_chat_answers_as_the_adapter_that_model_names(client):
    def ask(model):
        answer = client.chat.completions.create(
            model=model, messages=QUESTION, temperature=0, max_tokens=48
        )
        assert answer.model == model
        assert answer.usage.total_tokens == (
            answer.usage.prompt_tokens + answer.usage.completion_tokens
        )
        return answer.choices[0].message.content

    base, pirate = ask(BASE), ask("pirate")
    assert "Paris" in base
    assert base != pirate
    assert "arr" in pirate.lower()


def test_streamed_chat_is_the_same_text_in_pieces(client):
    kwargs = {"model": "pirate", "messages": QUESTION, "temperature": 0, "max_tokens": 32}
    whole = client.chat.completions.create(**kwargs).choices[0].message.content
    stream = client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **kwargs
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole
    assert len(pieces) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens > 5
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


def test_completions_take_texts_token_ids_and_lists_of_both(client):
    text = "The sea is"
    prompts = [text, [text, "A ship"], [1, 2, 3], [[1, 2, 3], [4, 5]]]
    counts = [1, 2, 1, 2]
    for prompt, count in zip(prompts, counts, strict=True):
        answer = client.completions.create(model="pirate", prompt=prompt, max_tokens=3)
        assert [c.index for c in answer.choices] == list(range(count))


def test_stop_strings_end_the_text_before_them(client):
    answer = client.completions.create(
        model=BASE, prompt="1, 2, 3, 4,", temperature=0, max_tokens=40, stop=[" 9"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert " 9" not in answer.choices[0].text


def test_logprobs_belong_to_the_tokens(client):
    answer = client.chat.completions.create(
        model="sql", messages=QUESTION, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert 1 <= len(content) <= 4
    assert all(t.logprob == max(o.logprob for o in t.top_logprobs) for t in content)


def test_a_seed_gives_the_same_tokens_in_any_company(client):
    kwargs = {"model": "pirate", "prompt": "The captain", "max_tokens": 24, "seed": 7}
    alone = client.completions.create(**kwargs).choices[0].text
    crowd = {"model": "sql", "prompt": ["a b c"] * 8, "max_tokens": 40}
    with openai.OpenAI(base_url=client.base_url, api_key="none") as other:
        kwargs_of_crowd = crowd | {"extra_body": {"ignore_eos": True}}
        busy = threading.Thread(target=other.completions.create, kwargs=kwargs_of_crowd)
        busy.start()
        together = [client.completions.create(**kwargs).choices[0].text for _ in range(3)]
        busy.join()
    assert together == [alone] * 3
    assert client.completions.create(**kwargs | {"seed": 8}).choices[0].text != alone


def test_n_samples_differ_and_are_counted(client):
    answer = client.completions.create(model=BASE, prompt="Once", max_tokens=12, n=3, seed=1)
    assert len({choice.text for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens <= 36


def test_a_prompt_seen_before_is_cached_and_answered_alike(client):
    question = "List the planets, and for each the year in which it was found. " * 6
    answers = [
        client.completions.create(model="pirate", prompt=question, max_tokens=8, temperature=0)
        for _ in range(2)
    ]
    first, second = (answer.usage.prompt_tokens_details.cached_tokens for answer in answers)
    num_prompt = answers[0].usage.prompt_tokens
    assert first == 0
    assert second == 16 * ((num_prompt - 1) // 16) > num_prompt / 2
    assert answers[0].choices[0].text == answers[1].choices[0].text
    base = client.completions.create(prompt=question, max_tokens=8, model=BASE)
    assert base.usage.prompt_tokens_details.cached_tokens == 0  # never across adapters


def test_what_cannot_come_in_time_is_refused_on_arrival(client):
    def ask(*prompts, ttft_slo_s):
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(
                model="pirate", prompt=list(prompts), extra_body={"ttft_slo_s": ttft_slo_s}
            )
        return caught.value

    never = ask("x " * 300, ttft_slo_s=0.0001)
    assert (never.status_code, never.code) == (400, "request_refused")
    assert "even when nothing else runs" in never.message
    # One of them is soon done; the last of so many is not.
    busy = ask(*(f"{i} " * 300 for i in range(64)), ttft_slo_s=5.0)
    assert (busy.status_code, busy.code) == (429, "overloaded")
    assert float(busy.response.headers["retry-after"]) >= 1


def test_a_prefetched_adapter_is_in_the_pool_before_anybody_asks(server, sdk, copy_of_pirate):
    record = sdk.adapters.push(copy_of_pirate(lora_alpha=9), name="hinted")
    assert sdk.adapters.get("hinted").state == "registered"
    sdk.adapters.prefetch("hinted")
    deadline = time.monotonic() + 20
    while not any(a["id"] == record.id for a in server.pool()["by_adapter"]):
        assert time.monotonic() < deadline, "the hint was lost"
        time.sleep(0.1)
    sdk.adapters.delete("hinted")


def test_errors_arrive_as_the_openai_exceptions(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="x")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=BASE, prompt=[5] * 2000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=BASE, prompt="x", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="teperature"):
        client.completions.create(model=BASE, prompt="x", extra_body={"teperature": 1})


def test_sixteen_streams_over_five_models_all_end_and_no_page_leaks(server):
    async def one(client, model):
        stream = await client.completions.create(
            model=model, prompt="Tell me about ships.", max_tokens=24, stream=True
        )
        reasons = [c.choices[0].finish_reason async for c in stream if c.choices]
        assert reasons[-1] in ("stop", "length")
        assert set(reasons[:-1]) <= {None}

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none") as client:
            models = [BASE, *ADAPTERS]
            await asyncio.gather(*(one(client, models[i % 5]) for i in range(16)))

    asyncio.run(all_at_once())
    server.wait_until_no_kv()


# ---- adapters come and go ------------------------------------------------------------------


def test_pushing_the_same_content_again_changes_nothing(sdk):
    before = sdk.adapters.get("pirate")
    assert sdk.adapters.push(EXAMPLES / "pirate").id == before.id


def test_a_name_with_other_content_is_refused_and_stays(sdk):
    before = sdk.adapters.get("pirate").id
    with pytest.raises(ConflictError):
        sdk.adapters.push(EXAMPLES / "sql", name="pirate")
    assert sdk.adapters.get("pirate").id == before


def test_two_uploads_of_one_name_at_once_have_one_winner(server):
    outcomes = []

    def push(source):
        with Client(base_url=server.base_url) as client:
            try:
                outcomes.append(client.adapters.push(EXAMPLES / source, name="race").id)
            except ConflictError:
                outcomes.append(None)

    threads = [threading.Thread(target=push, args=(s,)) for s in ("sql", "pirate", "sql")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Client(base_url=server.base_url) as client:
        winner = client.adapters.get("race").id
        client.adapters.delete("race")
    assert {o for o in outcomes if o} == {winner}


def test_an_adapter_deleted_while_in_use_finishes_what_runs(server, sdk, client, copy_of_pirate):
    folder = copy_of_pirate(lora_alpha=7)
    record = sdk.adapters.push(folder, name="leaving")
    stream = client.completions.create(
        model="leaving",
        prompt="The sea",
        max_tokens=60,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    freed = sdk.adapters.delete("leaving", timeout_s=200).freed
    assert freed.pool_bytes >= record.pool_pages * server.pool()["page_bytes"]
    assert freed.disk_bytes == record.size_bytes
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="leaving", prompt="x")
    reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
    assert reasons[-1] == "length"
    deadline = time.monotonic() + 10
    while any(a["id"] == record.id for a in server.pool()["by_adapter"]):
        assert time.monotonic() < deadline, "the deleted adapter keeps its pages"
        time.sleep(0.1)


def test_a_name_moves_between_versions_that_answer_each_as_themselves(sdk, client, copy_of_pirate):
    def answer(model):
        return (
            client.completions.create(model=model, prompt="The sea", temperature=0).choices[0].text
        )

    old = sdk.adapters.push(copy_of_pirate("old", lora_alpha=8), name="moving")
    as_old = answer("moving")
    new = sdk.adapters.push(
        copy_of_pirate("new", lora_alpha=64), name="moving", replace=True, expected_id=old.id
    )
    as_new = answer("moving")
    assert as_new != as_old
    assert answer(f"moving@{old.id[:25]}") == as_old
    assert sdk.adapters.pin("moving").pinned
    assert sdk.adapters.rollback("moving", version=1).id == old.id
    assert answer("moving") == as_old
    assert [(v.version, v.id, v.current) for v in sdk.adapters.versions("moving")] == [
        (2, new.id, False),
        (1, old.id, True),
    ]
    assert sdk.adapters.delete("moving", mode="cancel").freed.pool_bytes > 0


def test_a_cancelling_delete_ends_what_runs(sdk, client, copy_of_pirate):
    sdk.adapters.push(copy_of_pirate(lora_alpha=5), name="doomed")
    stream = client.completions.create(
        model="doomed",
        prompt="The sea",
        max_tokens=900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    started = time.monotonic()
    sdk.adapters.delete("doomed", mode="cancel")
    assert time.monotonic() - started < 5
    with pytest.raises(openai.APIError, match="was deleted"):
        list(stream)


def set_nan(tensors):
    next(iter(tensors.values()))[0, 0] = torch.nan
    return tensors


def cut_row(tensors):
    key = next(k for k in tensors if "lora_A" in k)
    return tensors | {key: tensors[key][:, :-1].contiguous()}


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (set_nan, {}, "NaN"),
        (cut_row, {}, "[12, 575]"),
        (lambda t: t, {"use_dora": True}, "lora_magnitude_vector"),
        (lambda t: t, {"base_model_name_or_path": "meta-llama/Llama-3-8B"}, "Llama-3-8B"),
        (lambda t: t | {"extra.weight": torch.zeros(2)}, {}, "extra.weight"),
        (lambda t: t, {"a_new_field": 5}, "a_new_field"),
    ],
)
def test_an_adapter_that_cannot_be_served_exactly_is_refused(
    sdk, copy_of_pirate, change, config, words
):
    with pytest.raises(UnprocessableEntityError) as refused:
        sdk.adapters.push(copy_of_pirate(change=change, **config), name="odd")
    assert any(words in reason for reason in refused.value.reasons), refused.value.reasons
    with pytest.raises(NotFoundError):
        sdk.adapters.get("odd")


def test_broken_uploads_get_a_clear_4xx_and_leave_nothing(server):
    weights = (EXAMPLES / "pirate" / "adapter_model.safetensors").read_bytes()
    config = (EXAMPLES / "pirate" / "adapter_config.json").read_bytes()

    def files(**parts):
        return [("files", (name.replace("__", "."), data)) for name, data in parts.items()]

    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter_config.json", config)
        with archive.open("adapter_model.safetensors", "w", force_zip64=True) as member:
            for _ in range(1100):  # a mebibyte each: above the limit, and about one in the upload
                member.write(bytes(1 << 20))
    evil = io.BytesIO()
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("../../adapter_config.json", config)
    url = f"{server.base_url}/v1/adapters"
    attempts = {
        "truncated": (
            "x",
            files(adapter_config__json=config, adapter_model__safetensors=weights[:999]),
        ),
        "pickle": ("x", files(adapter_config__json=config, adapter_model__bin=b"\x80\x04.")),
        "no config": ("x", files(adapter_model__safetensors=weights)),
        "bad json": ("x", files(adapter_config__json=b"{", adapter_model__safetensors=weights)),
        "bomb": ("x", [("archive", ("a.zip", bomb.getvalue()))]),
        "traversal": ("x", [("archive", ("a.zip", evil.getvalue()))]),
        "not an archive": ("x", [("archive", ("a.zip", b"hello"))]),
        "dots": ("../up", files(adapter_config__json=config, adapter_model__safetensors=weights)),
        "base name": (BASE, files(adapter_config__json=config, adapter_model__safetensors=weights)),
    }
    for label, (name, parts) in attempts.items():
        response = httpx.post(url, data={"name": name}, files=parts, timeout=120)
        assert 400 <= response.status_code < 500, (label, response.status_code, response.text)
        assert response.json()["error"]["message"], label
    assert httpx.get(f"{url}/x").status_code == 404
    data = server.log.parent / "data"
    assert not [p for p in data.rglob("*") if p.is_file() and "staging" in p.parts]


# ---- the command line ----------------------------------------------------------------------


def run_cli(server, *args, **kwargs):
    command = [sys.executable, "-c", "from loraplex.cli.main import main; main()"]
    env = os.environ | {"LORAPLEX_BASE_URL": server.base_url, "COLUMNS": "120"}
    return subprocess.run(
        [*command, *args], capture_output=True, text=True, env=env, timeout=120, **kwargs
    )


def test_the_command_line_lists_pushes_chats_and_removes(server):
    pushed = run_cli(server, "adapters", "push", str(EXAMPLES / "sql"), "--name", "sql-2")
    assert pushed.returncode == 0, pushed.stderr
    listed = run_cli(server, "adapters", "list")
    assert "sql-2" in listed.stdout
    answer = run_cli(server, "chat", "--model", "pirate", "What is the capital of France?")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()
    assert run_cli(server, "adapters", "rm", "sql-2", "--yes").returncode == 0
    gone = run_cli(server, "adapters", "show", "sql-2")
    assert gone.returncode == 1
    assert "Traceback" not in gone.stderr


# ---- things die ----------------------------------------------------------------------------


def test_a_client_that_leaves_mid_stream_frees_its_pages(server):
    body = {"model": BASE, "prompt": "x", "max_tokens": 900, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.base_url}/v1/completions", json=body) as response:
        lines = response.iter_lines()  # held: its collection would close the stream
        next(lines)
        deadline = time.monotonic() + 10
        while not server.pool()["kv"]:  # the engine tells of its pages now and then
            assert time.monotonic() < deadline, "the running stream holds no pages"
            time.sleep(0.02)
    server.wait_until_no_kv(timeout_s=10)


def test_a_client_that_leaves_mid_upload_leaves_nothing(server):
    def body():
        yield b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nhalf\r\n--b\r\n'
        yield b'Content-Disposition: form-data; name="files"; filename="adapter_model.safetensors"'
        yield b"\r\n\r\n" + bytes(100_000)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        httpx.post(
            f"{server.base_url}/v1/adapters",
            content=body(),
            headers={"content-type": "multipart/form-data; boundary=b"},
        )
    data = server.log.parent / "data"
    deadline = time.monotonic() + 10
    while any((data / "staging").iterdir()):
        assert time.monotonic() < deadline, "the half upload is still there"
        time.sleep(0.05)
    assert httpx.get(f"{server.base_url}/v1/adapters/half").status_code == 404


def test_a_dead_engine_fails_its_requests_once_and_comes_back(server, client, sdk):
    stream = client.completions.create(
        model="pirate",
        prompt="x",
        max_tokens=900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    chunks = iter(stream)
    next(chunks)
    os.kill(server.engine_pid(), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="restarted"):
        list(chunks)
    assert server.health() == 503
    with pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(model=BASE, prompt="x")
    assert int(refused.value.response.headers["retry-after"]) >= 1
    server.wait_until_ready()
    assert {a.name for a in sdk.adapters.list()} >= set(ADAPTERS)
    answer = client.completions.create(model="pirate", prompt="The sea", max_tokens=4)
    assert answer.usage.completion_tokens > 0


def test_it_stops_cleanly_and_remembers_its_adapters(tmp_path):
    first = ServerProcess(tmp_path, "--pool-bytes", "256MiB")
    try:
        first.wait_until_ready()
        engine_pid = first.engine_pid()
        with Client(base_url=first.base_url) as client:
            pushed = client.adapters.push(EXAMPLES / "pirate")
    finally:
        code = first.stop()
    assert code == 0, first.log.read_text()
    assert not is_alive(engine_pid)
    again = ServerProcess(tmp_path, "--pool-bytes", "256MiB")
    try:
        again.wait_until_ready()
        with Client(base_url=again.base_url) as client:
            assert [a.id for a in client.adapters.list()] == [pushed.id]
            assert client.completions.create(model="pirate", prompt="The", max_tokens=2).text
    finally:
        again.stop()


def test_a_busy_port_is_one_clear_line(tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "loraplex_server", "--port", str(port)]
        result = subprocess.run(
            [*command, "--data-dir", str(tmp_path)], capture_output=True, text=True, timeout=120
        )
    assert result.returncode == 1
    assert str(port) in result.stderr
    assert "Traceback" not in result.stderr
