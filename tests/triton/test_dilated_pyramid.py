"""dilated_pyramid's Triton kernels against the reference in float64, and compiled ahead of time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernelpose.triton_kernels import dilated_pyramid as kernels

from kernelpose.reference.dilated_pyramid import dilated_pyramid
from tests.ops.test_dilated_pyramid import CASES
from tests.parity import assert_parity
from tests.triton.aot import compile_all

# The interpreter computes bfloat16 wrongly; tests/ops has it where a GPU is.
DTYPES = [torch.float32, torch.float16]
LARGE = ("large", "large-tokens", "winograd", "winograd-tokens")  # the last two for a CPU's way
NAMES = [
    pytest.param(name, marks=pytest.mark.full if name in LARGE else ())
    for name, case in CASES.items()
    if case.shape[0]
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_forward(name: str, dtype: torch.dtype, interpreter: None, device: str) -> None:
    case = CASES[name]
    x, *parameters = (t.detach() for t in case.inputs(dtype, device))
    count = len(case.widths)
    weights, biases = parameters[:count], parameters[count:]
    options = (case.dilations, case.stride)
    eager, exact = (
        {
            mode: dilated_pyramid(x.to(d), weights, biases, *options, mode, case.activation)
            for mode in {"concat", case.mode}
        }
        for d in (dtype, torch.float64)
    )
    results = []
    for keep in (True, True, False):
        maps = torch.full_like(eager["concat"], torch.nan)
        total = torch.full_like(eager["sum"], torch.nan) if case.mode == "sum" else None
        relu = case.activation == "relu"
        kernels.forward(x, weights, biases, *options, relu, maps, total, keep)
        results.append((maps, total))
    (maps, total), again, less = results
    assert_parity(maps, eager["concat"], exact["concat"], "maps", dtype)
    assert torch.equal(maps, again[0])
    if total is not None and less[1] is not None:
        assert_parity(total, eager["sum"], exact["sum"], "sum", dtype)
        assert torch.equal(total, less[1]) and less[0][:, -case.widths[-1] :].isnan().all()
    assert all(map(torch.equal, (x, *parameters), case.inputs(dtype, device)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("given", ["all", "no carry", "no maps"])
def test_gradient_before_the_activation(
    given: str, tokens: bool, dtype: torch.dtype, interpreter: None, device: str
) -> None:
    """Of channels 5 to 24 of 40."""
    draw = torch.Generator().manual_seed(0)
    grad_out, maps = torch.randn(2, 2, 40, 9, 13, generator=draw).to(device, dtype)
    carry = torch.randn(2, 19, 9, 13, generator=draw).to(device, dtype)
    maps = F.relu(maps)
    expected = grad_out[:, 5:24].float() + (0 if given == "no carry" else carry.float())
    expected = expected if given == "no maps" else expected * (maps[:, 5:24] > 0)
    if tokens:
        grad_out, maps, carry = (
            t.contiguous(memory_format=torch.channels_last) for t in (grad_out, maps, carry)
        )
    grad = torch.full_like(carry, torch.nan)
    row, rows = (1, 2 * 117) if tokens else (117, 2)
    kernels.mask(
        grad_out[:, 5:],
        None if given == "no carry" else carry,
        None if given == "no maps" else maps[:, 5:],
        grad,
        (rows, 19 * row, 40 * row, 40 * row),
    )
    assert torch.equal(grad, expected.to(dtype))


def _check(variants: list[dict[str, Any]], registers: int, shared: int) -> None:
    used = compile_all(variants)
    assert len(used) == len(variants)
    for variant, usage in zip(variants, used, strict=True):
        assert usage["registers"] <= registers and usage["spilled"] == 0, (variant, usage)
        assert usage["shared"] <= shared, (variant, usage)


def _layers(
    widths: Iterable[tuple[int, int]],
    dtypes: Iterable[str],
    archs: Iterable[int],
    last: Iterable[bool],
) -> list[dict[str, Any]]:
    return [
        {
            "name": "_dilated_pyramid_layer_kernel",
            "module": "dilated_pyramid",
            "dtype": dtype,
            "arch": arch,
            "constants": {"CHANNELS": channels, "RELU": True}
            | kernels.blocks(channels, outputs, 4 if dtype == "fp32" else 2)
            | ({} if ends else {"first": None, "total": None}),
            "options": kernels.OPTIONS,
            "types": {"weight": "*fp32", "bias": "*fp32"}
            | dict.fromkeys(("x", "out", "first", "total"), f"*{dtype}"),
        }
        for (channels, outputs), dtype, arch, ends in itertools.product(widths, dtypes, archs, last)
    ]


def test_stem_compiles_within_its_budget() -> None:
    """HRPVT's stem in half, on the newer architecture."""
    variants = _layers(((3, 16), (16, 16)), ("fp16",), (90,), (False,))
    _check(variants, kernels.REGISTERS, kernels.SHARED)


@pytest.mark.full
def test_layers_compile_within_their_budget() -> None:
    """HRPVT's layers and odd ones, the last of a sum and the others."""
    widths = ((3, 16), (16, 16), (32, 32), (64, 64), (70, 33))
    variants = _layers(widths, ("fp32", "fp16", "bf16"), (80, 90), (False, True))
    _check(variants, kernels.REGISTERS, kernels.SHARED)


@pytest.mark.full
def test_gradient_before_the_activation_compiles_within_its_budget() -> None:
    variants: list[dict[str, Any]] = [
        {
            "name": "_dilated_pyramid_mask_kernel",
            "module": "dilated_pyramid",
            "dtype": dtype,
            "arch": arch,
            "constants": {"BLOCK_R": kernels.ELEMENTS // block, "BLOCK_C": block},
            "options": kernels.MASK_OPTIONS,
            "types": dict.fromkeys(("grad_out", "carry", "maps", "grad"), f"*{dtype}"),
        }
        for dtype, arch, block in itertools.product(("fp32", "fp16", "bf16"), (80, 90), (16, 1024))
    ]
    _check(variants, 64, 0)
