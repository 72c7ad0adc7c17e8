"""Folds of adapters whose linears share numbers, and may leave the rest to a seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PveraConfig, TinyLoraConfig, UniLoraConfig, VBLoRAConfig, VeraConfig
from peft.utils import get_peft_model_state_dict

from loraplex_server.adapters.folds.latent import (
    draw_tiny_projections,
    fold_latent,
    tied_group,
    tiny_latent,
)
from loraplex_server.adapters.folds.unilora import draw_assignments, fold_unilora
from loraplex_server.adapters.folds.vblora import (
    complete_weights,
    fold_vblora,
    mix,
    top_k_weights,
)
from loraplex_server.adapters.folds.vera import draw_projections, fold_pvera, fold_vera
from tests.support.tuned_linear import NUM_IN, NUM_OUT, TunedLinear, assert_same_update

BOTH = ["wide", "deep"]


def test_vera_uses_the_first_rows_and_columns_of_what_is_shared() -> None:
    tuned = TunedLinear(VeraConfig(r=8, projection_prng_key=11, target_modules=BOTH))
    shared_a, shared_b = (getattr(tuned.model.base_model, f"vera_{s}")["default"] for s in "AB")
    d, b = tuned.of("vera_lambda_d"), tuned.of("vera_lambda_b")
    assert_same_update(tuned.update(), fold_vera(shared_a, shared_b, d, b, NUM_IN))


@pytest.mark.parametrize("kind", ["vera", "pvera"])
def test_projections_can_be_drawn_again_where_a_file_leaves_them_out(kind: str) -> None:
    config_class: Any = {"vera": VeraConfig, "pvera": PveraConfig}[kind]
    config = config_class(r=8, projection_prng_key=11, target_modules=BOTH)
    tuned = TunedLinear(config)
    rows_per_rank = 2 if kind == "pvera" else 1
    a, b = draw_projections(11, 8, NUM_OUT, NUM_OUT, rows_per_rank=rows_per_rank)
    for side, drawn in (("A", a), ("B", b)):
        stored = getattr(tuned.model.base_model, f"{kind}_{side}")["default"]
        assert torch.equal(stored.float(), drawn)


def test_pvera_is_the_mean_of_its_distribution() -> None:
    tuned = TunedLinear(PveraConfig(r=8, projection_prng_key=11, target_modules=BOTH))
    shared_a, shared_b = (getattr(tuned.model.base_model, f"pvera_{s}")["default"] for s in "AB")
    d, b = tuned.of("pvera_lambda_d"), tuned.of("pvera_lambda_b")
    assert_same_update(tuned.update(), fold_pvera(shared_a, shared_b, d, b, NUM_IN))


def vblora(*, only_top_k: bool) -> TunedLinear:
    config = VBLoRAConfig(
        r=4,
        num_vectors=10,
        vector_length=12,
        topk=3,
        save_only_topk_weights=only_top_k,
        target_modules=BOTH,
    )
    return TunedLinear(config)


def test_vblora_mixes_the_vectors_with_the_largest_logits() -> None:
    tuned = vblora(only_top_k=False)
    bank = tuned.model.base_model.vblora_vector_bank["default"].detach()
    a, b = (mix(bank, *top_k_weights(tuned.of(f"vblora_logits_{s}"), 3)) for s in "AB")
    assert_same_update(tuned.update(), fold_vblora(a, b))


def test_vblora_files_may_leave_out_the_last_weight() -> None:
    tuned = vblora(only_top_k=True)
    saved = get_peft_model_state_dict(tuned.model)
    bank = saved["base_model.vblora_vector_bank"]
    stem = "base_model.model.wide.vblora_logits"
    a, b = (
        mix(
            bank,
            saved[f"{stem}_{side}_topk_indices"].long(),
            complete_weights(saved[f"{stem}_{side}_topk_weights"]),
        )
        for side in "AB"
    )
    assert_same_update(tuned.update(), fold_vblora(a, b))


@pytest.mark.parametrize("length", [64, 100_000])
def test_unilora_assigns_its_numbers_again(length: int) -> None:
    config = UniLoraConfig(r=4, theta_d_length=length, proj_seed=5, target_modules=BOTH)
    tuned = TunedLinear(config)
    theta = tuned.model.base_model.unilora_theta_d["default"].detach()
    shapes = [(NUM_IN, NUM_OUT), (NUM_OUT, NUM_IN)]
    first, second = draw_assignments(shapes, rank=4, length=length, seed=5)
    # PEFT keeps the scales in the base's float32.
    assert_same_update(tuned.update(), fold_unilora(theta, first), tolerance=1e-6)
    deep = tuned.model.base_model.model.deep
    assert torch.equal(deep.unilora_indices_B["default"], second.b_indices)


def test_tinylora_projects_its_vector_into_a_latent_matrix() -> None:
    config = TinyLoraConfig(r=3, u=5, projection_seed=9, target_modules=BOTH)
    tuned = TunedLinear(config)
    v = tuned.model.base_model.tinylora_v["default"]["0"].detach()
    projections = draw_tiny_projections(9, num_vectors=5, rank=3)
    assert torch.equal(tuned.of("tinylora_P").float(), projections)
    latent = tiny_latent(v, projections)
    factors = fold_latent(tuned.of("tinylora_A"), tuned.of("tinylora_B"), latent)
    assert_same_update(tuned.update(), factors)


@pytest.mark.parametrize(
    ("tying", "groups"),
    [
        (0.0, [0, 1, 2, 3, 4]),
        (1.0, [0, 0, 0, 0, 0]),
        (0.5, [0, 0, 1, 1, 1]),
        (0.4, [0, 1, 2, 2, 2]),
    ],
)
def test_tinylora_ties_neighbouring_linears(tying: float, groups: list[int]) -> None:
    assert [tied_group(i, 5, tying) for i in range(5)] == groups


def test_a_scaled_latent_matrix_stands_between_a_and_b() -> None:
    a, b, r = torch.randn(3, 8), torch.randn(6, 3), torch.randn(3, 3)
    update = 0.5 * (b.double() @ r.double() @ a.double())
    assert_same_update(update, fold_latent(a, b, r, scale=0.5))
