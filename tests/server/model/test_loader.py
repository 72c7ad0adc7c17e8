"""Loading Hugging Face folders: shards, damage, generation config."""

from __future__ import annotations

import json

import pytest
import torch

from loraplex_server.model.errors import CheckpointError, UnsupportedModel
from loraplex_server.model.loader import load_model, load_spec, load_weights
from loraplex_server.model.source import INDEX_FILE, WEIGHTS_FILE, resolve_model
from tests.server.model.paged_run import PagedRun
from tests.support.tiny_models import save_tiny_model, state_of, tiny_config, tiny_reference


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_a_saved_model_gives_the_logits_of_transformers(tmp_path, family):
    reference = save_tiny_model(tmp_path, family)
    model = load_model(resolve_model(tmp_path), dtype=torch.float32)
    tokens = [3, 14, 15, 92, 65]
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(
        PagedRun(model).step({"a": tokens})["a"], expected, atol=2e-5, rtol=0
    )


def test_shards_are_read_by_their_index(tmp_path):
    reference = tiny_reference(tiny_config())
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / INDEX_FILE).is_file()
    source = resolve_model(tmp_path)
    spec = load_spec(source)
    views = state_of(spec, load_weights(source, spec, dtype=torch.float32))
    assert all(torch.equal(views[n], t) for n, t in reference.state_dict().items())


def test_a_missing_shard_is_named(tmp_path):
    tiny_reference(tiny_config()).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load_model(resolve_model(tmp_path), dtype=torch.float32)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd"])
def test_an_index_cannot_point_out_of_the_folder(tmp_path, name):
    save_tiny_model(tmp_path / "model")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / "model" / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no shard"):
        load_model(resolve_model(tmp_path / "model"), dtype=torch.float32)


def test_an_index_that_is_no_index_is_refused(tmp_path):
    save_tiny_model(tmp_path)
    (tmp_path / INDEX_FILE).write_text("[]")
    with pytest.raises(CheckpointError, match="not an index"):
        load_model(resolve_model(tmp_path), dtype=torch.float32)


def test_a_truncated_file_is_refused(tmp_path):
    save_tiny_model(tmp_path)
    weights = tmp_path / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=WEIGHTS_FILE):
        load_model(resolve_model(tmp_path), dtype=torch.float32)


def test_end_tokens_of_the_generation_config_are_added(tmp_path):
    save_tiny_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 11]}))
    assert load_spec(resolve_model(tmp_path)).eos_token_ids == {2, 11}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 12}))
    assert load_spec(resolve_model(tmp_path)).eos_token_ids == {2, 12}
    (tmp_path / "generation_config.json").unlink()
    assert load_spec(resolve_model(tmp_path)).eos_token_ids == {2}


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_no_config_is_refused(tmp_path, text):
    save_tiny_model(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_spec(resolve_model(tmp_path))


def test_a_config_with_impossible_values_is_refused(tmp_path):
    save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"hidden_size": "wide"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="hidden_size"):
        load_spec(resolve_model(tmp_path))


def test_a_model_type_that_nobody_knows_is_refused(tmp_path):
    save_tiny_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lama"}))
    with pytest.raises(UnsupportedModel, match="lama"):
        load_spec(resolve_model(tmp_path))


def test_old_rope_scaling_configs_are_read(tmp_path):
    save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rope = load_spec(resolve_model(tmp_path)).rope
    assert rope.rope_type == "linear"
    assert rope.inv_freq[0] == 0.5
