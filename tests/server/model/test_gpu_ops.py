"""The forward pass through the Triton kernels, interpreted, against the CPU's."""

from __future__ import annotations

import pytest
import torch

from loraplex_kernels.model_tables import StepCapacity
from loraplex_kernels.ops import device_backend
from loraplex_server.model.transformer import kernel_model
from tests.server.model.paged_run import PagedRun
from tests.support.kernel_cases import make_weights
from tests.support.tiny_models import VOCAB, tiny_transformer

RANKS = ((4, 0, 3, 16, 1, 20, 2), (2, 8, 0, 0, 5, 0, 7))


def gpu_backend(pool, **capacity):
    sizes = {"max_tokens": 64, "max_sequences": 8, "max_pages": 64, "plane_elems": 1 << 16}
    return device_backend(
        kernel_model(pool), StepCapacity(**{**sizes, **capacity}), torch.device("cpu")
    )


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.manual_seed(seed)).tolist()


STEPS = [
    ({"a": prompt(9, 0), "b": prompt(1, 1)}, {"a": "x"}),
    ({"a": prompt(1, 2), "b": prompt(5, 3), "c": prompt(6, 4)}, {"a": "x", "c": "y"}),
    ({"a": prompt(1, 5), "b": prompt(1, 6), "c": prompt(1, 7)}, {"a": "x", "b": "x", "c": "y"}),
    ({"b": prompt(1, 8)}, {}),
]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "qwen2"])
def test_logits_are_those_of_the_cpu(family):
    model = tiny_transformer(family)
    ours, theirs = PagedRun(model, backend=gpu_backend), PagedRun(model)
    for run in (ours, theirs):
        for name, seed in (("x", 1), ("y", 2)):
            weights = make_weights(model.spec.geometry, RANKS, torch.manual_seed(seed))
            run.load_adapter(name, weights, RANKS)
    for tokens, adapters in STEPS:
        expected = theirs.step(tokens, adapters)
        for name, logits in ours.step(tokens, adapters).items():
            torch.testing.assert_close(logits, expected[name], atol=3e-5, rtol=0)
