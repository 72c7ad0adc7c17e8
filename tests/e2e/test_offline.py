"""The offline API: what a script sees."""

from __future__ import annotations

import pytest

from loraplex_scheduler.plan import FinishReason
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server import Engine
from loraplex_server.adapters.errors import InvalidUpload
from loraplex_server.config import Config
from loraplex_server.text.assembler import TextOptions
from tests.e2e.conftest import EXAMPLES

pytestmark = pytest.mark.model

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def engine():
    with Engine(Config(dtype="float32", pool_bytes=256 << 20, max_model_len=512)) as engine:
        engine.add_adapter("pirate", EXAMPLES / "pirate")
        yield engine


def test_base_and_adapter_answer_in_one_call(engine):
    base, pirate = engine.chat([QUESTION, QUESTION], adapters=[None, "pirate"])
    assert "Paris" in base.text
    assert "arr" in pirate.text.lower()
    assert base.finish_reason is pirate.finish_reason is FinishReason.STOP


def test_a_stop_string_ends_one_text_and_not_the_others(engine):
    short, whole = engine.generate(
        ["1, 2, 3, 4,"] * 2,
        sampling=[SamplingParams(max_tokens=n, temperature=0.0) for n in (40, 12)],
        text=TextOptions(stop=(" 9",)),
    )
    assert short.finish_reason is FinishReason.STOP
    assert " 9" not in short.text
    assert short.text.startswith(whole.text)
    assert engine.stats().pages_kv == 0


def test_a_prompt_that_cannot_run_says_why_and_the_others_run(engine):
    good, bad = engine.generate(["Hello", [5] * 600])
    assert good.text
    assert bad.finish_reason is FinishReason.REFUSED
    assert "512" in bad.message


def test_an_unknown_adapter_and_a_broken_folder_are_errors(engine, tmp_path):
    with pytest.raises(KeyError, match="nobody"):
        engine.generate(["x"], adapters=["nobody"])
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InvalidUpload):
        engine.add_adapter("odd", tmp_path)
