"""Adapters that once crashed, froze or bloated a reading, or were told to be the server's fault."""

from __future__ import annotations

import json
import math
import time
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_server.adapters.errors import AdapterError, AdapterRefused, InvalidUpload
from loraplex_server.adapters.formats.linears import PREFIX
from loraplex_server.adapters.upload import UploadStaging
from tests.support.adapters import make_config, make_folder, make_tensors, read_folder

Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
HUGE = 2**31 - 1


def config_of(kind: str, **fields: Any) -> dict[str, Any]:
    return {"peft_type": kind, "target_modules": ["q_proj"], **fields}


def write_weights(folder: Path, dtype: str, shapes: dict[str, list[int]]) -> None:
    """Write a file of tensors without a single element."""
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
        for name, shape in shapes.items()
    }
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text
    (folder / "adapter_model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (
            config_of("MULTITASK_PROMPT_TUNING", num_ranks=HUGE, num_tasks=HUGE, loraplex_task=0),
            ["prompt_embeddings", "prefix_task_cols", "prefix_task_rows"],
        ),
        (
            config_of("POLY", r=HUGE, n_tasks=HUGE, n_skills=HUGE, loraplex_task=0),
            [f"{Q}.poly_lora_A", f"{Q}.poly_lora_B", f"{Q}.poly_router.module_logits"],
        ),
        (config_of("PACA", r=HUGE), [f"{Q}.paca_w", f"{Q}.paca_indices"]),
        (
            config_of("VBLORA", r=HUGE, num_vectors=HUGE, vector_length=1),
            ["base_model.vblora_vector_bank", f"{Q}.vblora_logits_A", f"{Q}.vblora_logits_B"],
        ),
        (
            config_of("UNILORA", r=HUGE, save_indices=True),
            ["base_model.unilora_theta_d"]
            + [f"{Q}.unilora_{kind}_{side}" for kind in ("indices", "scales") for side in "AB"],
        ),
    ],
    ids=lambda value: value["peft_type"] if isinstance(value, dict) else "",
)
def test_claimed_sizes_that_no_file_holds_are_refused_at_no_cost(
    tmp_path: Path, config: dict[str, Any], names: list[str]
) -> None:
    make_folder(tmp_path, config=config)
    write_weights(tmp_path, "F32", {name: [0] for name in names})
    with pytest.raises(AdapterRefused):
        read_folder(tmp_path)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("shape", [[0, 2**64 - 1], [2**62, 0, 2**62], [2**63, 0]])
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("LOKR", ["lokr_w1", "lokr_w2"]),
        ("ADALORA", ["lora_A", "lora_B", "lora_E"]),
        ("LORA", ["lora_A.weight", "lora_B.weight"]),
    ],
)
def test_shapes_that_only_an_empty_tensor_can_have_are_refused(
    tmp_path: Path, dtype: str, shape: list[int], kind: str, names: list[str]
) -> None:
    make_folder(tmp_path, config=config_of(kind))
    write_weights(tmp_path, dtype, {f"{Q}.{name}": shape for name in names})
    with pytest.raises(AdapterError):
        read_folder(tmp_path)


def test_a_vera_without_linears_is_refused(tmp_path: Path) -> None:
    config = config_of("VERA", save_projection=False)
    folder = make_folder(tmp_path, config=config, tensors={})
    with pytest.raises(AdapterRefused, match="no tensors of an adapter"):
        read_folder(folder)


@pytest.mark.parametrize("first", [(1, 64), (64, 1), (64, 64), (1, 1), (8, 8)])
@pytest.mark.parametrize("is_constant", [True, False])
def test_a_kronecker_product_may_be_of_any_sides_and_ranks(
    tmp_path: Path, first: tuple[int, int], is_constant: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.ones(first) if is_constant else torch.randn(first, generator=generator)
    other = torch.randn(64 // first[0], 64 // first[1], generator=generator)
    tensors = {f"{Q}.lokr_w1": one, f"{Q}.lokr_w2": other}
    config = config_of("LOKR", r=4, alpha=4)
    pair = read_folder(make_folder(tmp_path, config=config, tensors=tensors)).weights.lora[0, "q"]
    product = pair.b @ pair.a * pair.scale
    torch.testing.assert_close(product, torch.kron(one, other), rtol=1e-5, atol=1e-4)


def test_a_configuration_of_many_levels_is_refused(tmp_path: Path) -> None:
    for depth in (60, 300, 900, 950, 980, 5000):
        nested: Any = "[" * depth + "]" * depth
        text = json.dumps(make_config(x="here")).replace('"here"', nested)
        make_folder(tmp_path)
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(InvalidUpload, match=r"levels|not valid JSON"):
            read_folder(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": [f"m{i}" for i in range(80_000)]},
        {"use_bdlora": {"nblocks": 1, "target_modules_bd_a": [f"m{i}" for i in range(80_000)]}},
        {"rank_pattern": {f"[a{i}]" * 1900: 4 for i in range(70)}},
        {"rank_pattern": {f"m{i}" + "x" * 18_000: 4 for i in range(55)}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_as_many_names_as_fit_into_a_configuration_take_no_long_time(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    others = {f"base_model.model.x{i}.weight": torch.zeros(1) for i in range(3000)}
    folder = make_folder(tmp_path, config=make_config(**fields), tensors=make_tensors() | others)
    begin = time.process_time()
    with pytest.raises(AdapterRefused):
        read_folder(folder)
    assert time.process_time() - begin < 10.0


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_numbers_whose_sums_pass_float32_are_the_adapters_fault(tmp_path: Path, side: str) -> None:
    tensors = make_tensors()
    for name in tensors:
        if side in name:
            tensors[name][0, 0] = 3e38
    with pytest.raises(AdapterRefused, match="diverged"):
        read_folder(make_folder(tmp_path, config=make_config(lora_alpha=1), tensors=tensors))


def test_large_but_possible_numbers_are_served(tmp_path: Path) -> None:
    tensors = {name: 1e4 * tensor for name, tensor in make_tensors().items()}
    weights = read_folder(make_folder(tmp_path, tensors=tensors)).weights
    assert all(math.isfinite(float(pair.b.abs().max())) for pair in weights.lora.values())


def test_a_zip_that_begins_before_its_file_is_broken(tmp_path: Path) -> None:
    target = BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("adapter_config.json", b"{}")
        archive.writestr("adapter_model.safetensors", b"x")
    content = bytearray(target.getvalue())
    content[-6:-2] = (0xFFFF).to_bytes(4, "little")  # where the directory is said to be
    with UploadStaging(tmp_path) as upload:
        upload.write_part("a.zip", [bytes(content)])
        with pytest.raises(InvalidUpload, match="points outside"):
            upload.finish()
