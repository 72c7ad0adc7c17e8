"""GGUF files: written here for each architecture, and the embedded default model."""

from __future__ import annotations

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loraplex_server.model.errors import CheckpointError, UnsupportedModel
from loraplex_server.model.gguf_file import read_gguf_config
from loraplex_server.model.loader import load_model, load_spec, load_weights
from loraplex_server.model.source import resolve_model
from loraplex_server.model.spec import ModelSpec
from tests.server.model.paged_run import PagedRun
from tests.support.tiny_models import state_of, tiny_config, tiny_reference

#: llama.cpp's names of modules, by checkpoint name.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEAD_DIM = {"llama": 8, "qwen2": 8, "qwen3": 128, "phi3": 8}


def gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module in NAMES:
        return f"{NAMES[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def write_gguf(path, family: str, metadata=None, tensors=(), eot_token_id=None, kind=None):
    """Write a tiny random model as llama.cpp's converter does and return the reference."""
    config = tiny_config(family, head_dim=HEAD_DIM[family])
    reference = tiny_reference(config)
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("tiny")
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(2)
    if eot_token_id is not None:
        writer.add_eot_token_id(eot_token_id)
    for key, value in (metadata_of(config) | (metadata or {})).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](f"{family}.{key}", value)
    for name, tensor in reference.state_dict().items():
        value = permuted(name, tensor, config).numpy()
        if kind is not None and value.ndim > 1 and value.shape[1] % 32 == 0:
            value = gguf.quantize(value, kind)
            writer.add_tensor(gguf_name(name), value, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), value)
    for name in tensors:
        writer.add_tensor(name, torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return reference


def metadata_of(config) -> dict[str, int | float | str]:
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": HEAD_DIM[config.model_type],
        "attention.key_length": HEAD_DIM[config.model_type],
    }


def permuted(name: str, tensor: torch.Tensor, config) -> torch.Tensor:
    """Put rotation pairs side by side, as llama.cpp has it for this architecture only."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((n for part, n in heads.items() if part in name), None)
    if config.model_type != "llama" or count is None:
        return tensor
    return tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


@pytest.mark.parametrize("family", HEAD_DIM)
def test_every_architecture_is_read_as_transformers_reads_it(tmp_path, family):
    path = tmp_path / "tiny.gguf"
    written = write_gguf(path, family).state_dict()
    source = resolve_model(path)
    spec = load_spec(source)
    config = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    assert spec == ModelSpec.from_config(config, base_name="tiny")
    views = state_of(spec, load_weights(source, spec, dtype=torch.float32))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).state_dict()
    assert views.keys() == theirs.keys() == written.keys()
    for name, view in views.items():
        assert torch.equal(view, theirs[name]), name
        assert torch.equal(view, written[name]), name


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "rope.scaling.type", "yarn"),
        ("llama", "expert_count", 8),
        ("qwen2", "rope.dimension_count", 4),
        ("qwen2", "something.new", 1),
        ("qwen2", "attention.sliding_window", 16),
        ("qwen3", "attention.value_length", 64),
    ],
)
def test_metadata_that_would_be_lost_is_refused_by_name(tmp_path, family, key, value):
    write_gguf(tmp_path / "tiny.gguf", family, {key: value})
    with pytest.raises(UnsupportedModel) as caught:
        read_gguf_config(tmp_path / "tiny.gguf")
    assert caught.value.field == key


def test_metadata_without_effect_is_accepted(tmp_path):
    metadata = {"expert_count": 0, "rope.scaling.type": "none", "attention.key_length": 8}
    write_gguf(tmp_path / "tiny.gguf", "llama", metadata)
    assert read_gguf_config(tmp_path / "tiny.gguf").hidden_size == 32


def test_the_head_size_of_the_metadata_is_applied(tmp_path):
    metadata = {"attention.key_length": 16, "rope.dimension_count": 16}
    write_gguf(tmp_path / "tiny.gguf", "qwen3", metadata)
    assert read_gguf_config(tmp_path / "tiny.gguf").head_dim == 16


def test_the_end_of_a_turn_ends_a_sequence(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "llama", eot_token_id=9)
    assert load_spec(resolve_model(tmp_path / "tiny.gguf")).eos_token_ids == {2, 9}


def test_the_window_of_the_metadata_is_applied(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "phi3", {"attention.sliding_window": 6})
    assert load_spec(resolve_model(tmp_path / "tiny.gguf")).sliding_windows == (6, 6)


def test_a_tensor_without_a_place_is_refused_by_name(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "llama", tensors=["rope_freqs.weight"])
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        load_model(resolve_model(tmp_path / "tiny.gguf"), dtype=torch.float32)


def test_an_architecture_that_is_not_computed_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=r"mamba.*qwen3"):
        read_gguf_config(path)


def test_a_file_without_a_model_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"no llama\.context_length"):
        read_gguf_config(path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all, not even close"])
def test_a_file_that_is_no_gguf_is_refused(tmp_path, content):
    (tmp_path / "tiny.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a GGUF"):
        read_gguf_config(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match="not a GGUF"):
        load_model(resolve_model(path), dtype=torch.float32)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16", "BF16"])
def test_quantised_tensors_are_those_of_the_gguf_package(tmp_path, kind):
    path = tmp_path / "tiny.gguf"
    reference = write_gguf(path, "llama", kind=gguf.GGMLQuantizationType[kind])
    source = resolve_model(path)
    spec = load_spec(source)
    weights = load_weights(source, spec, dtype=torch.float32)
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}["token_embd.weight"]
    expected = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(weights.embedding, expected.float())
    torch.testing.assert_close(
        weights.embedding, reference.model.embed_tokens.weight.data, atol=0.05, rtol=0.05
    )


@pytest.mark.model
@pytest.mark.slow
def test_the_default_model_writes_what_transformers_writes():
    source = resolve_model(None)
    model = load_model(source, dtype=torch.float32, max_model_len=256)
    tokenizer = source.load_tokenizer()
    assert tokenizer.eos_token_id in model.spec.eos_token_ids
    messages = [{"role": "user", "content": "Name the capital of France and its river."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    tokens = greedy(model, prompt, 16)
    assert "Paris" in tokenizer.decode(tokens)
    assert tokens == transformers_greedy(source, prompt, tokens)


def greedy(model, prompt: list[int], count: int) -> list[int]:
    run = PagedRun(model, num_pages=32, page_tokens=16)
    run.step({"a": prompt[:10]})
    logits = run.step({"a": prompt[10:]})["a"]
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < count:
        tokens.append(int(run.step({"a": tokens[-1:]})["a"][-1].argmax()))
    return tokens


@torch.inference_mode()
def transformers_greedy(source, prompt: list[int], tokens: list[int]) -> list[int]:
    """Return the greedy choice after each prefix of `tokens`: equal to them, or they differ."""
    reference = AutoModelForCausalLM.from_pretrained(
        source.path.parent, gguf_file=source.path.name, dtype=torch.float32
    ).eval()
    logits = reference(torch.tensor([prompt + tokens])).logits[0]
    return logits[len(prompt) - 1 : -1].argmax(-1).tolist()
