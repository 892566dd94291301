"""inverted_bottleneck's Triton kernel against the reference, and compiled ahead of time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from kernelpose.triton_kernels import inverted_bottleneck as kernels
from torch import Tensor

from kernelpose.reference.inverted_bottleneck import inverted_bottleneck
from tests.ops.test_inverted_bottleneck import CASES, Case
from tests.parity import assert_parity
from tests.triton.aot import compile_all

# The interpreter computes bfloat16 wrongly; tests/ops has it where a GPU is.
DTYPES = [torch.float32, torch.float16]
SLOW = ("odd", "odd-stride", "even-stride", "stage", "wide", "several-blocks")
NAMES = [
    pytest.param(name, marks=pytest.mark.full if name in SLOW else ())
    for name, case in CASES.items()
    if case.batch
]


def _run(case: Case, x: Tensor, *weights: Tensor | None) -> Tensor:
    size = [(side + case.stride - 1) // case.stride for side in case.size]
    out = x.new_full((case.batch, *size, case.channels[2]), torch.nan)
    pixels = x.permute(0, 2, 3, 1).contiguous()
    kernels.forward(pixels, list(weights), out, case.stride, case.residual, case.activations)
    return out.permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_parity(name: str, dtype: torch.dtype, interpreter: None, device: str) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype, device)
    tensors, options = case.arguments(inputs)
    got = _run(case, *tensors)
    eager = inverted_bottleneck(*tensors, **options)
    exact = case.run([t.double() for t in inputs], "eager")
    assert_parity(got, eager, exact, "out", dtype)
    assert all(map(torch.equal, inputs, case.inputs(dtype, device)))
    assert torch.equal(got, _run(case, *tensors))


# (C, hidden, outputs), stride, 0 without a depthwise convolution: MobileViTPose's, a feed-forward
# network, odd ones.
SHAPES = {
    "xxs-first": ((16, 32, 16), 1),
    "s-first": ((32, 128, 64), 2),
    "s-stage1": ((64, 256, 64), 1),
    "s-last": ((128, 512, 160), 2),
    "odd": ((33, 130, 50), 1),
    "wide": ((640, 2560, 640), 2),
    "tokens": ((640, 2560, 640), 0),
    "odd-tokens": ((33, 130, 50), 0),
}
TENSORS = ("expand", "depthwise", "project")
POINTERS = ("x", "out", *TENSORS, *(f"{name}_bias" for name in TENSORS))


def _check(dtype: str, shapes: Iterable[str], archs: Iterable[int]) -> None:
    tiles, variants = [], []
    for shape, arch in itertools.product(shapes, archs):
        channels, stride = SHAPES[shape]
        tile, constants = kernels.constants(channels, 4 if dtype == "fp32" else 2, stride)
        own: dict[str, Any] = {"RESIDUAL": stride < 2 and channels[0] == channels[2]}
        if stride == 0:
            own |= {"depthwise": None, "depthwise_bias": None}
        tiles.append(tile)
        variants.append(
            {
                "name": "_inverted_bottleneck_kernel",
                "module": "inverted_bottleneck",
                "dtype": dtype,
                "arch": arch,
                "constants": {**constants, **own, "ACT1": "silu", "ACT2": "silu"},
                "options": kernels.options(tile),
                "types": dict.fromkeys(POINTERS, f"*{dtype}"),
            }
        )
    used = compile_all(variants)
    for tile, variant, usage in zip(tiles, variants, used, strict=True):
        assert usage["registers"] <= tile.registers and usage["spilled"] == 0, (variant, usage)
        assert usage["shared"] <= tile.shared, (variant, usage)


def test_compiles_within_its_budget() -> None:
    """MobileViTPose-S's first stage in float16, on the newer architecture."""
    _check("fp16", ["s-stage1"], (90,))


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tile_compiles_within_its_budget(shape: str, dtype: str) -> None:
    _check(dtype, [shape], (80, 90))
