"""Checks of the LoRA kernels against their torch reference, on any device.

Everything that must not be read is NaN (unused pages, rows of `x` without an adapter, the gaps
between rows), and everything that must not be written is compared bit by bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from loraplex_kernels import cpu
from loraplex_kernels.batch import PagedAdapter, build_lora_batch
from loraplex_kernels.lora_shape import LoRAShape, LoRATuning
from loraplex_kernels.lora_work import (
    ITEM_FIELDS,
    LoRATables,
    build_lora_work,
    no_lora_work,
)
from loraplex_memory.layout import PROJECTIONS, ModelGeometry, PoolLayout
from tests.support.kernel_cases import ODD, SMALL, SMOLLM2, LoRACase, PageWriter, make_lora_case
from tests.support.lora_cases import (
    POPULARITY,
    RANKS,
    SERIAL,
    SHORT_PARTS,
    Launcher,
    Rows,
    assert_agrees,
    check_site,
    make_activations,
    reference_site,
    site_shapes,
    spread,
)


def agrees_with_the_reference(
    popularity: str,
    ranks: str,
    *,
    dtype: torch.dtype,
    geometry: ModelGeometry = SMALL,
    sites: Sequence[int] = (0, 1, 2, 3),
    layers: Sequence[int] = (0,),
    is_scattered: bool = True,
    tuning: LoRATuning = SHORT_PARTS,
) -> Callable[[torch.device], None]:
    """Return the check of some sites of one batch."""

    def check(device: torch.device) -> None:
        rows = POPULARITY[popularity]
        adapters = spread(ranks, len(rows))
        case = make_lora_case(
            adapters, rows, geometry=geometry, dtype=dtype, is_scattered=is_scattered
        )
        shapes = site_shapes(case.pool.layout, tuning)
        assert case.batch is not None
        work = build_lora_work(case.batch, shapes)
        for layer in layers:
            for site in sites:
                check_site(Launcher(device), case, rows, shapes[site], layer, work)

    return check


def every_popularity_and_rank() -> list[tuple[str, Callable[[torch.device], None]]]:
    """The full product on the small model, other axes taking turns."""
    checks = []
    for p, popularity in enumerate(POPULARITY):
        for r, ranks in enumerate(RANKS):
            dtype = (torch.float32, torch.bfloat16)[(p + r) % 2]
            check = agrees_with_the_reference(
                popularity,
                ranks,
                dtype=dtype,
                sites=(1 if ranks == "rank 200" else (p + r) % 4,),
                layers=(r % 2,),
                is_scattered=(p + r // 2) % 2 == 0,
                tuning=(SHORT_PARTS, SHORT_PARTS, SERIAL)[(p + r) % 3],
            )
            checks.append((f"{popularity}, {ranks}", check))
    return checks


def a_batch_without_rows_changes_nothing(device: torch.device) -> None:
    shapes = site_shapes(PoolLayout(SMALL))
    pool = torch.full((4, PoolLayout(SMALL).page_elems), torch.nan)
    for shape in shapes:
        y, x = make_activations(shape, [], torch.float32)
        for layer in (0, 1):
            out = Launcher(device).run(y, x, pool, no_lora_work(2, len(shapes)), shape, layer)
            assert torch.equal(out, y)


def an_empty_batch_of_tokens_changes_nothing(device: torch.device) -> None:
    shapes = site_shapes(PoolLayout(SMALL))
    pool = torch.full((4, PoolLayout(SMALL).page_elems), torch.nan)
    y, x = torch.empty(0, 96), torch.empty(0, 96)
    out = Launcher(device).run(y, x, pool, no_lora_work(2, len(shapes)), shapes[1])
    assert out.shape == (0, 96)


def ranks_up_to_512(device: torch.device) -> None:
    rows = [[0, 3, 1], [4]]
    for geometry, rank in ((SMALL, 512), (ODD, 300)):
        ranks = [[[2, 2, 2, rank, 2, 2, 2]] * 2, [[2] * 7] * 2]
        case = make_lora_case(ranks, rows, geometry=geometry, dtype=torch.bfloat16)
        shapes = site_shapes(case.pool.layout)
        work = build_lora_work(case.batch, shapes)
        check_site(Launcher(device), case, rows, shapes[1], 0, work)


def a_rows_bits_do_not_depend_on_its_company(device: torch.device) -> None:
    """Company, tile position, page places, grid, split or serial: none may change a bit."""
    # The interpreter multiplies with BLAS, whose sums depend on the width of a tile.
    serial = SERIAL if device.type == "cuda" else replace(SERIAL, serial_rank_tile=16)
    short = replace(SHORT_PARTS, segment_rows=16)
    settings: list[tuple[Rows, LoRATuning, int]] = [
        ([[4]], SHORT_PARTS, 1),
        ([[0, 4]], SHORT_PARTS, 3),
        ([[0, 1, 2, 3, *range(5, 18), 4]], SHORT_PARTS, 2),
        ([[4, 7], [1, 2, 3]], SHORT_PARTS, 7),
        ([list(range(20))], short, 3),
        ([[4]], serial, 1),
        ([list(range(19)), [19]], serial, 3),
    ]
    ranks = [[[12, 8, 3, 20, 1, 24, 7]] * 2, [[16] * 7] * 2]
    for geometry, dtype, site in (
        (SMALL, torch.bfloat16, 0),
        (SMALL, torch.float32, 1),
        (ODD, torch.float32, 1),
    ):
        shape = site_shapes(PoolLayout(geometry))[site]
        y, x = make_activations(shape, [list(range(20))], dtype)
        outcomes = [
            _row_4(
                Launcher(device, num_programs),
                (y, x),
                _same_adapter(ranks, rows, geometry, dtype, seed),
                site,
                tuning,
            )
            for seed, (rows, tuning, num_programs) in enumerate(settings)
        ]
        assert not torch.equal(outcomes[0], y[4])
        assert all(torch.equal(outcomes[0], row) for row in outcomes)


def _same_adapter(
    ranks: list[list[list[int]]],
    rows: Rows,
    geometry: ModelGeometry,
    dtype: torch.dtype,
    seed: int,
) -> LoRACase:
    """Return a case whose first adapter always has the same weights, at other pages each time."""
    case = make_lora_case(ranks[: len(rows)], rows, geometry=geometry, dtype=dtype)
    shuffled = list(range(case.pool.num_pages))
    random.Random(seed).shuffle(shuffled)
    places = torch.tensor(shuffled)
    case.pool.data[:, places] = case.pool.data.clone()
    assert case.batch is not None
    table = places[case.batch.page_table.long()].int()
    return replace(case, batch=replace(case.batch, page_table=table))


def _row_4(
    launcher: Launcher,
    activations: tuple[torch.Tensor, torch.Tensor],
    case: LoRACase,
    site: int,
    tuning: LoRATuning,
) -> torch.Tensor:
    shapes = site_shapes(case.pool.layout, tuning)
    assert case.batch is not None
    work = build_lora_work(case.batch, shapes)
    assert work.is_serial == (tuning.serial_rows == 1)
    return launcher.run(*activations, case.pool.layer(0), work, shapes[site])[4]


def a_row_that_is_not_finite_stays_alone(device: torch.device) -> None:
    rows = [[0, 1, 2], [3], [4, 5]]
    case = make_lora_case([[[16] * 7] * 2] * 3, rows, geometry=SMALL)
    shapes = site_shapes(case.pool.layout)
    work = build_lora_work(case.batch, shapes)
    y, x = make_activations(shapes[0], rows, torch.float32)
    sound = Launcher(device).run(y, x, case.pool.layer(0), work, shapes[0])
    x[1], x[3] = torch.inf, torch.nan
    with np.errstate(invalid="ignore"):  # of the interpreter
        out = Launcher(device).run(y, x, case.pool.layer(0), work, shapes[0])
    assert out[[1, 3]].isnan().all()
    assert torch.equal(out[[0, 2, 4, 5, 6]], sound[[0, 2, 4, 5, 6]])


def pages_lie_beyond_2_to_the_31_elements(device: torch.device) -> None:
    """4 GiB, of which a CPU maps only what is written."""
    rows: Rows = [[0, 2], [1]]
    for geometry, site in ((SMALL, 0), (ODD, 1)):
        ranks = [[[5] * 7] * 2, [[18] * 7] * 2]
        case = make_lora_case(ranks, rows, geometry=geometry, dtype=torch.bfloat16)
        shape = site_shapes(case.pool.layout)[site]
        batch, small = case.batch, case.pool.layer(0)
        assert batch is not None
        y, x = make_activations(shape, rows, torch.bfloat16)
        expected = y.clone()
        reference_site(expected, x, small, batch, shape)
        first = 2**31 // shape.page_elems + 1
        pool = torch.empty(
            first + len(small), shape.page_elems, dtype=torch.bfloat16, device=device
        )
        pool[first:] = small.to(device)
        far = replace(batch, page_table=batch.page_table + first)
        work = build_lora_work(far, site_shapes(case.pool.layout))
        assert_agrees(Launcher(device).run(y, x, pool, work, shape), expected, y)


def tables_at_fixed_addresses_serve_any_step(device: torch.device) -> None:
    """Steps of fewer segments after larger ones, in tables that keep what was there before."""
    steps = [
        ([[[40] * 7] * 2, [[16] * 7] * 2, [[24] * 7] * 2], [[0, 1, 2], [3], list(range(4, 24))]),
        ([[[8] * 7] * 2], [[2]]),
        ([[[4] * 7] * 2, [[50] * 7] * 2], [[9], [1, 3]]),
        ([], []),
        ([[[16, 0, 0, 0, 0, 0, 0]] * 2], [[0, 1]]),
    ]
    shapes = site_shapes(PoolLayout(SMALL))
    tables = _dirty_tables(device, len(shapes))
    for adapters, rows in steps:
        case = make_lora_case(adapters, rows, geometry=SMALL)
        batch = case.batch
        work = build_lora_work(batch, shapes) if batch else no_lora_work(2, len(shapes))
        for name in ("rows", "pages", "spans", "items"):
            array = torch.from_numpy(np.ascontiguousarray(getattr(work, name))).view(-1)
            getattr(tables, name).view(-1)[: array.numel()] = array.to(device)
        for site in (0, 1):
            y, x = make_activations(shapes[site], rows, torch.float32)
            expected = y.clone()
            if batch is not None:
                reference_site(expected, x, case.pool.layer(1), batch, shapes[site], layer=1)
            out = Launcher(device).run(y, x, case.pool.layer(1), tables, shapes[site], layer=1)
            assert_agrees(out, expected, y)


def _dirty_tables(device: torch.device, num_sites: int) -> LoRATables:
    def dirt(*shape: int) -> torch.Tensor:
        return torch.full(shape, 2**30, dtype=torch.int32, device=device)

    return LoRATables(
        rows=dirt(64),
        pages=dirt(1024),
        spans=dirt(2, num_sites, 4, 2),
        items=dirt(512, ITEM_FIELDS),
        planes=torch.empty(1 << 16, device=device),
        is_serial=False,
    )


def scale_and_bias_apply_to_their_module_only(device: torch.device) -> None:
    """Adapters with both, with a scale alone at rank 0, with a bias alone, and with neither."""
    for geometry, dtype in ((SMALL, torch.float32), (SMALL, torch.bfloat16), (ODD, torch.float32)):
        layout = PoolLayout(geometry)
        shape = site_shapes(layout)[0]
        pool = torch.full((80, layout.page_elems), torch.nan, dtype=dtype)
        free = random.Random(0).sample(range(80), 80)
        kinds = [(5, (0, 2), (0, 1)), (0, (1,), ()), (0, (), (0, 2)), (3, (), ())]
        adapters = [_epilogue_adapter(layout, pool, free, *kind) for kind in kinds]
        rows: Rows = [[0, 2], [3], [5, 4], [7]]
        batch = build_lora_batch(adapters, rows, layout.chunk_elems)
        assert batch is not None
        work = build_lora_work(batch, [shape])
        y, x = make_activations(shape, rows, dtype)
        expected = y.clone()
        reference_site(expected, x, pool, batch, shape)
        assert not torch.equal(expected[3], y[3])
        out = Launcher(device).run(y, x, pool, work, shape)
        assert_agrees(out, expected, y)


def weights_scale_the_delta_alone(device: torch.device) -> None:
    """One adapter at three weights, one with a scale and a bias, and one that has nothing."""
    for dtype in (torch.float32, torch.bfloat16):
        layout = PoolLayout(SMALL)
        shape = site_shapes(layout)[0]
        pool = torch.full((80, layout.page_elems), torch.nan, dtype=dtype)
        free = random.Random(0).sample(range(80), 80)
        plain, scaled, empty = (
            _epilogue_adapter(layout, pool, free, *kind)
            for kind in ((5, (), ()), (3, (0, 2), (1,)), (0, (), ()))
        )
        chosen = [(plain, 0.25), (plain, -2.0), (plain, 1.0), (scaled, 0.5), (empty, 3.0)]
        adapters = [replace(adapter, weight=weight) for adapter, weight in chosen]
        rows: Rows = [[0, 2], [3], [5, 4], [7, 6, 8], [9]]
        batch = build_lora_batch(adapters, rows, layout.chunk_elems)
        assert batch is not None
        y, x = make_activations(shape, rows, dtype)
        expected = y.clone()
        reference_site(expected, x, pool, batch, shape)
        out = Launcher(device).run(y, x, pool, build_lora_work(batch, [shape]), shape)
        assert_agrees(out, expected, y)
        on_host = y.clone()
        modules, widths = shape.modules, shape.out_features
        cpu.add_lora(on_host, x, pool, batch, layer=0, projections=modules, out_features=widths)
        assert_agrees(on_host, expected, y)


def _epilogue_adapter(
    layout: PoolLayout,
    pool: torch.Tensor,
    free: list[int],
    rank: int,
    scaled: Sequence[int],
    biased: Sequence[int],
) -> PagedAdapter:
    """Return an adapter of one layer whose q, k, v are laid out one by one, B before A."""
    generator = torch.Generator().manual_seed(rank + len(scaled))
    geometry, writer = layout.geometry, PageWriter(layout)
    tables = {name: np.full((1, 7), -1, dtype=np.int32) for name in ("a", "b", "scale", "bias")}
    ranks = np.zeros((1, 7), dtype=np.int32)
    for module in range(3):
        width = geometry.out_features(PROJECTIONS[module])
        ranks[0, module] = rank
        vectors = torch.randn(3, width, generator=generator)
        if module in scaled:
            tables["scale"][0, module] = writer.add(vectors[:2])
        tables["b"][0, module] = writer.add(torch.randn(rank, width, generator=generator))
        a = torch.randn(rank, geometry.hidden_size, generator=generator) / 10
        tables["a"][0, module] = writer.add(a)
        if module in biased:
            tables["bias"][0, module] = writer.add(vectors[2])
    writer.add(torch.zeros(1))
    pages = writer.write(pool, free)
    has_epilogue = bool(scaled or biased)
    return PagedAdapter(
        pages,
        ranks,
        tables["a"],
        tables["b"],
        tables["scale"] if has_epilogue else None,
        tables["bias"] if has_epilogue else None,
    )


def the_output_head_takes_lora_by_the_same_kernels(device: torch.device) -> None:
    """A vocabulary that is no multiple of a chunk, addressed through the whole pool's pages."""
    vocab_size, num_pages, layer = 203, 60, 1
    for dtype, ranks in ((torch.float32, (5, 20)), (torch.bfloat16, (16, 1))):
        layout = PoolLayout(SMALL)
        pool = torch.full((2, num_pages, layout.page_elems), torch.nan, dtype=dtype)
        free = random.Random(0).sample(range(num_pages), num_pages)
        adapters = []
        for rank in ranks:
            generator = torch.Generator().manual_seed(rank)
            writer = PageWriter(layout)
            a_chunk = writer.add(torch.randn(rank, SMALL.hidden_size, generator=generator) / 10)
            b_chunk = writer.add(torch.randn(rank, vocab_size, generator=generator))
            pages = writer.write(pool[layer], free)
            whole = [layer * num_pages + page for page in pages]
            adapters.append(PagedAdapter(whole, [[rank]], [[a_chunk]], [[b_chunk]]))
        rows: Rows = [[0, 3, 4], [2]]
        shape = LoRAShape(
            0, (0,), SMALL.hidden_size, (vocab_size,), layout.chunk_elems, layout.page_elems
        )
        batch = build_lora_batch(adapters, rows, layout.chunk_elems)
        assert batch is not None
        flat = pool.view(-1, layout.page_elems)
        y, x = make_activations(shape, rows, dtype)
        expected = y.clone()
        reference_site(expected, x, flat, batch, shape)
        out = Launcher(device).run(y, x, flat, build_lora_work(batch, [shape]), shape)
        assert_agrees(out, expected, y)


def embeddings_take_lora_by_token(device: torch.device) -> None:
    vocab_size, num_pages = 150, 80
    for dtype in (torch.float32, torch.bfloat16):
        layout = PoolLayout(SMALL)
        pool = torch.full((num_pages, layout.page_elems), torch.nan, dtype=dtype)
        free = random.Random(0).sample(range(num_pages), num_pages)
        rows: Rows = [[0, *range(3, 23)], [2], [25, 24]]
        shape = LoRAShape(
            index=0,
            modules=(0,),
            in_features=0,
            out_features=(SMALL.hidden_size,),
            chunk_elems=layout.chunk_elems,
            page_elems=layout.page_elems,
            is_embedding=True,
        )
        generator = torch.Generator().manual_seed(0)
        token_ids = torch.randint(vocab_size, (27,), generator=generator)
        y = torch.randn(27, SMALL.hidden_size, generator=generator).to(dtype)
        expected = y.clone()
        adapters = []
        for segment, rank in zip(rows, (5, 33, 16), strict=True):
            a_t = torch.randn(vocab_size, rank, generator=generator).to(dtype)
            b = torch.randn(rank, SMALL.hidden_size, generator=generator).to(dtype)
            writer = PageWriter(layout)
            chunks = writer.add(a_t, is_packed=True), writer.add(b)
            pages = writer.write(pool, free)
            adapters.append(PagedAdapter(pages, [[rank]], [[chunks[0]]], [[chunks[1]]]))
            delta = a_t[token_ids[segment]].float() @ b.float()
            expected[segment] = (y[segment].float() + delta).to(dtype)
        batch = build_lora_batch(adapters, rows, layout.chunk_elems)
        assert batch is not None
        out = Launcher(device).run(y, token_ids, pool, build_lora_work(batch, [shape]), shape)
        assert_agrees(out, expected, y)


def _smollm2(
    popularity: str, ranks: str, dtype: torch.dtype, sites: Sequence[int]
) -> Callable[[torch.device], None]:
    return agrees_with_the_reference(
        popularity, ranks, dtype=dtype, geometry=SMOLLM2, sites=sites, tuning=LoRATuning()
    )


LORA_CHECKS: list[tuple[str, Callable[[torch.device], None]]] = [
    *every_popularity_and_rank(),
    ("no row has an adapter", a_batch_without_rows_changes_nothing),
    ("empty batch", an_empty_batch_of_tokens_changes_nothing),
    ("SmolLM2 float32", _smollm2("one row", "rank 8", torch.float32, (0, 1, 2, 3))),
    ("SmolLM2 bfloat16", _smollm2("skewed", "mixed ranks", torch.bfloat16, (0, 1))),
    (
        "float16, both layers",
        agrees_with_the_reference(
            "distinct", "mixed ranks", dtype=torch.float16, layers=(0, 1), sites=(1,)
        ),
    ),
    (
        "odd geometry float32",
        agrees_with_the_reference(
            "zipf", "mixed ranks", dtype=torch.float32, geometry=ODD, layers=(0, 1), sites=(1,)
        ),
    ),
    (
        "odd geometry bfloat16, contiguous pages",
        agrees_with_the_reference(
            "skewed",
            "mixed ranks",
            dtype=torch.bfloat16,
            geometry=ODD,
            is_scattered=False,
            sites=(3,),
        ),
    ),
    ("ranks up to 512", ranks_up_to_512),
    ("bits do not depend on company", a_rows_bits_do_not_depend_on_its_company),
    ("a row that is not finite stays alone", a_row_that_is_not_finite_stays_alone),
    ("pages beyond 2^31 elements", pages_lie_beyond_2_to_the_31_elements),
    ("tables at fixed addresses", tables_at_fixed_addresses_serve_any_step),
    ("scale and bias", scale_and_bias_apply_to_their_module_only),
    ("weights", weights_scale_the_delta_alone),
    ("output head", the_output_head_takes_lora_by_the_same_kernels),
    ("embedding", embeddings_take_lora_by_token),
]
