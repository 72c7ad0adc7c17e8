from __future__ import annotations

import pytest
import torch
from peft import (
    AdaLoraConfig,
    DeftConfig,
    DeloraConfig,
    GraloraConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PolyConfig,
    get_peft_model,
)

from loraplex_server.adapters.folds.adalora import fold_adalora
from loraplex_server.adapters.folds.deft import Decomposition, fold_deft
from loraplex_server.adapters.folds.delora import fold_delora
from loraplex_server.adapters.folds.factors import stack
from loraplex_server.adapters.folds.gralora import fold_gralora
from loraplex_server.adapters.folds.hadamard import fold_hadamard
from loraplex_server.adapters.folds.householder import (
    fold_orthogonal_reflections,
    fold_reflections,
)
from loraplex_server.adapters.folds.kronecker import (
    fold_kronecker,
    split_matrix,
)
from loraplex_server.adapters.folds.miss import fold_miss
from loraplex_server.adapters.folds.paca import fold_paca
from loraplex_server.adapters.folds.poly import fold_poly
from loraplex_server.adapters.folds.prompts import fold_multitask_prompt, split_prefix
from tests.support.tuned_linear import (
    NUM_IN,
    NUM_OUT,
    Linears,
    TunedLinear,
    assert_same_update,
)

TARGETS = ["wide"]


def test_adalora_is_divided_by_the_rank_it_began_with() -> None:
    config = AdaLoraConfig(init_r=6, lora_alpha=16, total_step=10, target_modules=TARGETS)
    tuned = TunedLinear(config)
    a, b, e = (tuned.of(f"lora_{side}") for side in "ABE")
    factors = fold_adalora(a, b, e, scale=16, initial_rank=6)
    assert_same_update(tuned.update(), factors)


def test_loha_is_one_pair_at_the_product_of_its_ranks() -> None:
    tuned = TunedLinear(LoHaConfig(r=3, alpha=6, target_modules=TARGETS))
    first, second = ((tuned.of(f"hada_w{i}_a"), tuned.of(f"hada_w{i}_b")) for i in (1, 2))
    factors = fold_hadamard(first, second, scale=2.0)
    assert factors[0].shape == (9, NUM_IN)
    assert_same_update(tuned.update(), factors)


def test_loha_never_takes_more_ranks_than_the_linear_has() -> None:
    tuned = TunedLinear(LoHaConfig(r=6, alpha=6, target_modules=TARGETS))
    first, second = ((tuned.of(f"hada_w{i}_a"), tuned.of(f"hada_w{i}_b")) for i in (1, 2))
    factors = fold_hadamard(first, second, scale=1.0)
    assert factors[0].shape == (NUM_IN, NUM_IN)
    assert_same_update(tuned.update(), factors)


@pytest.mark.parametrize("decompose_both", [False, True])
@pytest.mark.parametrize("rank", [2, 40])
def test_lokr_is_one_pair_however_its_matrices_are_stored(rank: int, decompose_both: bool) -> None:
    config = LoKrConfig(
        r=rank, alpha=8, decompose_both=decompose_both, decompose_factor=6, target_modules=TARGETS
    )
    tuned = TunedLinear(config)
    first, second = (
        split_matrix(tuned.of(name))
        if "default" in getattr(tuned.layer, name)
        else (tuned.of(f"{name}_a"), tuned.of(f"{name}_b"))
        for name in ("lokr_w1", "lokr_w2")
    )
    factors = fold_kronecker(first, second, scale=8 / rank)
    assert factors[0].shape[0] <= min(NUM_IN, first[0].shape[1] * second[0].shape[1])
    assert_same_update(tuned.update(), factors)


@pytest.mark.parametrize("rank", [8, 7])
def test_miss_folds_inputs_even_where_they_do_not_fill_the_last_group(rank: int) -> None:
    tuned = TunedLinear(MissConfig(r=rank, target_modules=TARGETS))
    factors = fold_miss(tuned.of("miss_block"), num_in=NUM_IN, num_out=NUM_OUT)
    assert_same_update(tuned.update(), factors)


def test_mini_miss_repeats_its_block_along_the_outputs() -> None:
    config = MissConfig(r=8, mini_r=4, init_weights="mini", target_modules=TARGETS)
    tuned = TunedLinear(config)
    factors = fold_miss(tuned.of("miss_block"), num_in=NUM_IN, num_out=NUM_OUT)
    assert_same_update(tuned.update(), factors)


@pytest.mark.parametrize("is_orthogonal", [False, True])
def test_a_chain_of_reflections_has_their_number_as_its_rank(is_orthogonal: bool) -> None:
    tuned = TunedLinear(HRAConfig(r=6, apply_GS=is_orthogonal, target_modules=TARGETS))
    fold = fold_orthogonal_reflections if is_orthogonal else fold_reflections
    factors = fold(tuned.weight, tuned.of("hra_u"))
    assert factors[0].shape == (6, NUM_IN)
    assert_same_update(tuned.update(), factors)


def test_delora_takes_the_norms_of_the_weight_from_the_file() -> None:
    tuned = TunedLinear(DeloraConfig(r=4, target_modules=TARGETS))
    a, b, strength = (tuned.of(f"delora_{name}") for name in ("A", "B", "lambda"))
    strength.fill_(15.0)
    # Norms of another base than this one: they are part of the adapter.
    tuned.layer.delora_w_norm["default"] = torch.rand(NUM_IN, dtype=torch.float64) + 1
    factors = fold_delora(a, b, strength, tuned.layer.delora_w_norm["default"])
    assert_same_update(tuned.update(), factors)


@pytest.mark.parametrize(("k", "rank", "hybrid"), [(2, 4, 0), (4, 8, 3), (1, 3, 2)])
def test_gralora_blocks_exchange_their_ranks(k: int, rank: int, hybrid: int) -> None:
    config = GraloraConfig(r=rank, alpha=16, gralora_k=k, hybrid_r=hybrid, target_modules=TARGETS)
    tuned = TunedLinear(config)
    scale = 16 / (rank + hybrid)
    factors = fold_gralora(tuned.of("gralora_A"), tuned.of("gralora_B"), scale=scale)
    if hybrid:
        general = (tuned.of("gralora_A_general"), tuned.of("gralora_B_general"))
        factors = stack([factors, general], [1.0, scale])
    assert factors[0].shape == (k * rank + hybrid, NUM_IN)
    assert_same_update(tuned.update(), factors)


@pytest.mark.parametrize("decomposition", ["relu", "qr"])
@pytest.mark.parametrize(("para", "alpha"), [(False, None), (False, 12), (True, None)])
def test_deft_removes_a_subspace_and_injects_another(
    decomposition: Decomposition, para: bool, alpha: int | None
) -> None:
    config = DeftConfig(
        r=4, decomposition_method=decomposition, para=para, alpha=alpha, target_modules=TARGETS
    )
    tuned = TunedLinear(config)
    factors = fold_deft(
        tuned.weight,
        tuned.of("deft_P"),
        None if para else tuned.of("deft_R"),
        decomposition=decomposition,
        scale=alpha / 4 if alpha else 1.0,
    )
    # PEFT computes this method in float32 whatever the dtype.
    assert_same_update(tuned.update(), factors, tolerance=1e-4)


def test_paca_replaces_whole_columns() -> None:
    weight, columns = torch.randn(NUM_OUT, NUM_IN), torch.randn(NUM_OUT, 3)
    indices = torch.tensor([20, 0, 7])
    replaced = weight.double()
    replaced[:, indices] = 2.5 * columns.double()
    factors = fold_paca(weight, columns, indices, scale=2.5)
    assert_same_update(replaced - weight.double(), factors)


@pytest.mark.parametrize("splits", [1, 3])
def test_poly_mixes_factors_by_the_task(splits: int) -> None:
    config = PolyConfig(r=2, n_tasks=3, n_skills=4, n_splits=splits, target_modules=TARGETS)
    tuned = TunedLinear(config)
    router = tuned.layer.poly_router["default"].module_logits.detach()
    for task in range(3):
        factors = fold_poly(tuned.of("poly_lora_A"), tuned.of("poly_lora_B"), router[task])
        assert_same_update(tuned.update(task_ids=torch.tensor([task])), factors)


def test_a_weighted_stack_is_what_peft_merges_by_concatenation() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Linears(), LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS))
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=3, target_modules=TARGETS))
    layer = model.base_model.model.wide
    for b in layer.lora_B.values():
        torch.nn.init.normal_(b.weight)
    names = ["default", "other"]
    model.add_weighted_adapter(names, [0.7, -1.3], "both", combination_type="cat")
    updates = [
        (layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach() * scale)
        for name, scale in zip(names, [3.0, 1.0], strict=True)
    ]
    factors = stack(updates, [0.7, -1.3])
    assert factors[0].shape == (5, NUM_IN)
    expected = layer.get_delta_weight("both").detach().double()
    assert_same_update(expected, factors, tolerance=1e-5)


def test_a_task_scales_every_element_of_the_shared_prompt() -> None:
    shared, columns, rows = torch.randn(5, 8), torch.randn(5, 2), torch.randn(2, 8)
    prompt = fold_multitask_prompt(shared, columns, rows)
    assert prompt.dtype == torch.float64
    torch.testing.assert_close(prompt.float(), shared * (columns @ rows))


def test_a_prefix_is_cut_into_keys_and_values_of_layers() -> None:
    num_layers, kv_heads, head_dim, n = 3, 2, 4, 5
    stored = torch.randn(n, 2 * num_layers * kv_heads * head_dim)
    layers = split_prefix(stored, num_layers)
    # PEFT's own view of it.
    whole = stored.view(n, num_layers * 2, kv_heads, head_dim)
    for index, layer in enumerate(layers):
        key, value = layer.chunk(2, dim=1)
        assert torch.equal(key.view(n, kv_heads, head_dim), whole[:, 2 * index])
        assert torch.equal(value.view(n, kv_heads, head_dim), whole[:, 2 * index + 1])
