"""The Triton kernels of cascaded_attention against the reference, and compiled ahead of time."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import triton
from kernelpose.triton_kernels import cascaded_attention as kernels
from kernelpose.triton_kernels.window_attention_tiles import Tile, block_d, launch_options
from torch import Tensor

from kernelpose.reference.cascaded_attention import cascaded_attention
from tests.ops.test_cascaded_attention import CASES, Case
from tests.parity import assert_parity
from tests.triton.aot import compile_all

# The interpreter computes bfloat16 wrongly; tests/ops has it where a GPU is.
DTYPES = [torch.float32, torch.float16]
EPS = 1e-5
QUICK_NUMBERS, MOST_NUMBERS = 10_000, 200_000  # the interpreter takes seconds, then minutes


def _numbers(case: Case) -> int:
    return case.batch * math.prod(case.size) * case.groups * case.width


NAMES = [
    pytest.param(name, marks=pytest.mark.full if _numbers(case) > QUICK_NUMBERS else ())
    for name, case in CASES.items()
    if 0 < _numbers(case) <= MOST_NUMBERS
]


def _run(case: Case, inputs: list[Tensor]) -> Tensor:
    out = torch.full_like(inputs[0], torch.nan)
    kernels.forward(inputs, out, case.heads, EPS)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_parity(name: str, dtype: torch.dtype, interpreter: None, device: str) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype, device)
    got = _run(case, inputs)
    eager = cascaded_attention(*inputs, num_heads=case.heads, eps=EPS)
    exact = cascaded_attention(*(t.double() for t in inputs), num_heads=case.heads, eps=EPS)
    assert_parity(got, eager, exact, "out", dtype)
    assert all(map(torch.equal, inputs, case.inputs(dtype, device)))
    assert torch.equal(got, _run(case, inputs))


# Width of a group, heads and ratio: HEViTPose's, and the widest; block_d is 16 to 128. Heads of 128
# channels are not for float32.
SHAPES = {
    "t-stage1": (16, 2, 8),
    "s-stage1": (32, 2, 8),
    "b-stage1": (40, 2, 8),
    "b-stage2": (64, 2, 4),
    "b-stage3": (96, 2, 2),
    "widest": (128, 2, 3),
    "widest-heads": (128, 1, 3),
}
PARAMETERS = itertools.product(("reduce", "q", "kv", "out", "norm"), ("weight", "bias"))
POINTERS = ("x", "found", "kv", *("_".join(names) for names in PARAMETERS))


def _variants(
    dtype: str, shapes: list[str], archs: tuple[int, ...]
) -> list[tuple[Tile, dict[str, Any]]]:
    runs = []
    size = 4 if dtype == "fp32" else 2
    types = dict.fromkeys(POINTERS, f"*{dtype}") | {"scale": "fp32", "eps": "fp32"}
    for shape, arch in itertools.product(shapes, archs):
        d, heads, ratio = SHAPES[shape]
        queries, keys = kernels.TILES[size, block_d(d)]
        step = min(keys.step, triton.next_power_of_2(ratio**2))
        of_keys = {"RATIO": ratio, "BLOCK": keys.block, "STEP": step}
        of_queries = {
            "HEAD_DIM": d // heads, "BLOCK_HEAD": block_d(d // heads),
            "BLOCK": queries.block, "STEP": queries.step,
        }  # fmt: skip
        for kernel, tile, own in (("keys", keys, of_keys), ("queries", queries, of_queries)):
            variant = {
                "name": f"_cascaded_attention_{kernel}_kernel",
                "module": "cascaded_attention",
                "dtype": dtype,
                "arch": arch,
                "constants": {"D": d, "BLOCK_D": block_d(d), **own},
                "options": launch_options(tile),
                "types": types,
            }
            runs.append((tile, variant))
    return runs


def _check(runs: list[tuple[Tile, dict[str, Any]]]) -> None:
    used = compile_all([variant for _, variant in runs])
    faults = []
    for (tile, variant), usage in zip(runs, used, strict=True):
        within = usage["registers"] <= tile.registers and usage["shared"] <= tile.shared
        if usage["spilled"] or not within:
            faults.append(f"{variant['name']} {variant['constants']} {tile}: {usage}")
    assert not faults, "\n".join(faults)


def test_compiles_within_its_budget() -> None:
    """The first stage of HEViTPose-B in float16, on the newer architecture."""
    _check(_variants("fp16", ["b-stage1"], (90,)))


@pytest.mark.full
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        pair
        for pair in itertools.product(("fp32", "fp16", "bf16"), SHAPES)
        if pair != ("fp32", "widest-heads")
    ],
)
def test_every_tile_compiles_within_its_budget(dtype: str, shape: str) -> None:
    _check(_variants(dtype, [shape], (80, 90)))
