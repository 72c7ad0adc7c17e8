"""LoRA through the paged pool against a dense model with the update merged into its weights."""

from __future__ import annotations

import copy

import pytest
import torch

from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair
from loraplex_memory.layout import PROJECTIONS
from tests.server.model.paged_run import PagedRun
from tests.support.tiny_models import VOCAB, tiny_config, tiny_reference, transformer_of

FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
#: Ranks per layer in the order q k v o gate up down; 0 is no module.
ADAPTERS = {
    "all": ((8, 4, 1, 16, 3, 3, 5), (2, 2, 2, 2, 2, 2, 2)),
    "attention": ((4, 0, 4, 0, 0, 0, 0), (0, 0, 0, 7, 0, 0, 0)),
    "mlp": ((0, 0, 0, 0, 9, 0, 0), (0, 0, 0, 0, 0, 5, 33)),
}
SEQUENCES = {"a": "all", "b": None, "c": "attention", "d": "mlp", "e": "all", "f": None}


def random_adapter(geometry, ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        (layer, projection): LoRAPair(
            a=torch.randn(rank, geometry.in_features(projection), generator=generator) * 0.2,
            b=torch.randn(geometry.out_features(projection), rank, generator=generator) * 0.2,
            scale=0.5 + seed,
        )
        for layer, row in enumerate(ranks)
        for projection, rank in zip(PROJECTIONS, row, strict=True)
        if rank
    }


def merged(reference, geometry, adapter):
    """Return a copy of the transformers model with `scale * B A` added to its linears."""
    model = copy.deepcopy(reference)
    for (layer, projection), pair in adapter.items():
        block = model.model.layers[layer]
        part = block.self_attn if projection in "qkvo" else block.mlp
        delta = pair.scale * pair.b @ pair.a
        if hasattr(part, f"{projection}_proj"):
            getattr(part, f"{projection}_proj").weight.data += delta
            continue
        fused = FUSED[projection]
        names = [p for p in PROJECTIONS if FUSED.get(p) == fused]
        start = sum(geometry.out_features(p) for p in names[: names.index(projection)])
        rows = slice(start, start + delta.shape[0])
        getattr(part, f"{fused}_proj").weight.data[rows] += delta
    return model


@pytest.fixture(params=["llama", "qwen2", "phi3"], name="scene")
def _scene(request):
    """A run with three adapters loaded, and the dense model of each."""
    reference = tiny_reference(tiny_config(request.param))
    run = PagedRun(transformer_of(reference), num_pages=256)
    geometry = run.layout.geometry
    dense = {None: reference}
    for seed, (name, ranks) in enumerate(ADAPTERS.items()):
        adapter = random_adapter(geometry, ranks, seed)
        assert AdapterWeights(adapter).spec(2).ranks == ranks
        run.load_adapter(name, adapter, ranks)
        dense[name] = merged(reference, geometry, adapter)
    return run, dense


def tokens_of(name: str) -> list[int]:
    return torch.randint(3, VOCAB, (20,), generator=torch.manual_seed(ord(name))).tolist()


@torch.inference_mode()
def assert_dense_logits(logits, dense, adapter, tokens) -> None:
    expected = dense[adapter](torch.tensor([tokens])).logits[0, -len(logits) :]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_adapters_and_base_in_one_forward_equal_their_merged_models(scene):
    run, dense = scene
    logits = run.step({name: tokens_of(name) for name in SEQUENCES}, SEQUENCES)
    for name, adapter in SEQUENCES.items():
        assert_dense_logits(logits[name], dense, adapter, tokens_of(name))


def test_prefill_chunks_beside_decodes_equal_the_merged_models(scene):
    run, dense = scene
    run.step({name: tokens_of(name)[:17] for name in "abc"}, SEQUENCES)
    mixed = {name: tokens_of(name)[17:18] for name in "abc"}
    mixed |= {name: tokens_of(name)[:9] for name in "def"}
    logits = run.step(mixed, SEQUENCES)
    for name, adapter in SEQUENCES.items():
        seen = tokens_of(name)[: run.lengths[name]]
        assert_dense_logits(logits[name], dense, adapter, seen)


def test_an_adapter_changes_the_logits(scene):
    run, _ = scene
    tokens = tokens_of("a")
    logits = run.step({"a": tokens, "b": tokens, "c": tokens}, SEQUENCES)
    assert (logits["a"] - logits["b"]).abs().max() > 0.1
    assert (logits["c"] - logits["b"]).abs().max() > 0.1


def test_bfloat16_weights_and_pages_stay_close_to_float32():
    reference = tiny_reference(tiny_config())
    ranks = ADAPTERS["all"]
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        run = PagedRun(transformer_of(reference, dtype=dtype), num_pages=256)
        run.load_adapter("all", random_adapter(run.layout.geometry, ranks, 0), ranks)
        steps = {"a": tokens_of("a"), "b": tokens_of("b")}
        logits[dtype] = torch.cat(list(run.step(steps, SEQUENCES).values()))
    assert logits[torch.bfloat16].dtype == torch.float32
    error = (logits[torch.bfloat16] - logits[torch.float32]).abs()
    assert error.mean() < 0.05 * logits[torch.float32].std()
