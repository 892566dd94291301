"""Every kernel and tile compiles without a GPU, spills nothing and keeps its budget.

By default the tiles of one head width and dtype for sm_90, with every set of options but the grid
partition; with --full all of them, for sm_80 as well.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from kernelpose.triton_kernels import window_attention
from kernelpose.triton_kernels import window_attention_tiles as tiles

from tests.triton.aot import compile_all

ARCHS = (80, 90)
DTYPES = {"fp32": 4, "fp16": 2, "bf16": 2}
HEAD_DIMS = {16: 16, 32: 20, 64: 64, 128: 80}  # block_d -> the head width it is compiled for
SHARED_LIMIT = 163 * 1024  # bytes a block on sm_80, the smaller one

# (kernel, table, options that change its code): None stands for an argument that is not there.
NO_BIAS = {"bias": None}
NO_POOL = {"pooled": None}
NO_POOL_BACKWARD = {"pooled": None, "grad_pooled": None}
CELL_KERNELS: list[tuple[str, str, list[dict[str, Any]]]] = [
    (
        "_window_attention_forward_kernel",
        "FORWARD",
        [{}, NO_BIAS, NO_POOL, NO_BIAS | NO_POOL],
    ),
    ("_window_attention_delta_kernel", "BACKWARD", [{}]),
    ("_window_attention_pool_backward_kernel", "POOL_BACKWARD", [{}]),
    ("_window_attention_backward_kernel", "BACKWARD", [NO_BIAS, NO_BIAS | NO_POOL_BACKWARD]),
    ("_window_attention_backward_kernel", "BACKWARD_WITH_BIAS", [{}, NO_POOL_BACKWARD]),
    ("_window_attention_bias_backward_kernel", "BIAS_BACKWARD", [{}]),
]


def _constants(
    tile: tiles.Tile, head_dim: int, grid: bool, one_tile: bool, options: dict[str, Any]
) -> dict[str, Any]:
    constants = {
        "HEAD_DIM": head_dim,
        "GRID": grid,
        "BLOCK_D": tiles.block_d(head_dim),
        "BLOCK": tile.block,
        "STEP": tile.step,
        "BLOCK_P": tiles.POOL_BLOCK,
        "BLOCK_C": tile.step,
        "ONE_TILE": one_tile,
    } | options
    if one_tile and "bias" in options and "pooled" in options:
        constants["delta"] = None
    return constants


def _check(runs: list[tuple[str, tiles.Tile, dict[str, Any]]]) -> None:
    variants = [
        {
            "name": name,
            "module": "window_attention",
            "options": window_attention.launch_options(tile),
            **rest,
        }
        for name, tile, rest in runs
    ]
    used = compile_all(variants)
    faults = []
    for (name, tile, rest), usage in zip(runs, used, strict=True):
        within = usage["registers"] <= tile.registers and usage["shared"] <= tile.shared
        if usage["spilled"] or not within:
            faults.append(f"{name} {tile} {rest}: {usage}")
    assert not faults, "\n".join(faults)


def _runs(
    kernel: tuple[str, str, list[dict[str, Any]]],
    dtype: str,
    block_d: int,
    archs: tuple[int, ...],
    grids: tuple[bool, ...],
) -> list[tuple[str, tiles.Tile, dict[str, Any]]]:
    name, table, options = kernel
    entries = getattr(tiles, table)[DTYPES[dtype], block_d]
    uses = {(tile, tokens <= tile.block == tile.step) for tokens, tile in entries.items()}
    uses.add((entries[max(entries)], False))  # any larger cell
    if name != "_window_attention_backward_kernel":
        uses = {(tile, False) for tile, _ in uses}
    return [
        (
            name,
            tile,
            {
                "dtype": dtype,
                "arch": arch,
                "constants": _constants(tile, HEAD_DIMS[block_d], grid, one_tile, option),
            },
        )
        for (tile, one_tile), option, grid, arch in itertools.product(
            sorted(uses), options, grids, archs
        )
    ]


def test_tables_fit_the_hardware() -> None:
    for table, size, block_d in itertools.product({k[1] for k in CELL_KERNELS}, (2, 4), HEAD_DIMS):
        entries = getattr(tiles, table)[size, block_d]
        assert list(entries) == sorted(entries)
        for tile in entries.values():
            assert tile.registers <= 255 and tile.registers * 32 * tile.warps <= 65536
            assert tile.shared <= SHARED_LIMIT / 2  # two blocks a multiprocessor


@pytest.mark.parametrize("kernel", CELL_KERNELS, ids=lambda kernel: kernel[0] + "-" + kernel[1])
def test_vit_head_in_half(kernel: tuple[str, str, list[dict[str, Any]]]) -> None:
    """Head width 64 in float16, which every ViTPose but S and H has, on the newer architecture."""
    _check(_runs(kernel, "fp16", 64, (90,), (False,)))


def test_pooling_and_bias_reduction() -> None:
    runs = []
    for dtype, arch, grid in itertools.product(DTYPES, ARCHS, (False, True)):
        rest = {
            "dtype": dtype,
            "arch": arch,
            "constants": _constants(tiles.POOL, 64, grid, False, {}),
        }
        runs.append(("_window_attention_pool_kernel", tiles.POOL, rest))
    constants = _constants(tiles.BIAS_REDUCE, 64, False, False, {})
    for arch in ARCHS:
        rest = {"dtype": "fp32", "arch": arch, "constants": constants}
        runs.append(("_window_attention_bias_reduce_kernel", tiles.BIAS_REDUCE, rest))
    _check(runs)


@pytest.mark.full
@pytest.mark.parametrize("block_d", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", CELL_KERNELS, ids=lambda kernel: kernel[0] + "-" + kernel[1])
def test_every_tile(
    kernel: tuple[str, str, list[dict[str, Any]]], dtype: str, block_d: int
) -> None:
    _check(_runs(kernel, dtype, block_d, ARCHS, (False, True)))
