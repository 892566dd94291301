"""multi_granularity's Triton kernels against the reference in float64, and compiled ahead."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kernelpose.triton_kernels import multi_granularity as kernels
from kernelpose.triton_kernels import multi_granularity_backward as backward_kernels
from torch import Tensor

from tests.ops.test_multi_granularity import CASES, Case
from tests.parity import assert_parity
from tests.triton.aot import compile_all
from tests.triton.cases import QUICK_NUMBERS

# The interpreter computes bfloat16 wrongly; tests/ops has it where a GPU is. A second goes by for
# every few programs, minutes for the largest cases.
PARITY = [
    pytest.param(
        *(name, dtype),
        id=f"{name}-{dtype}",
        marks=() if name == "small-tokens" else pytest.mark.full,
    )
    for (name, case), dtype in itertools.product(CASES.items(), (torch.float32, torch.float16))
    if 0 not in case.shape and (dtype == torch.float16 or math.prod(case.shape) <= QUICK_NUMBERS)
]


def _run(case: Case, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """out, and the gradients of all inputs, of the Triton kernels."""
    x, *parameters = inputs
    out, *gradients = (torch.full_like(t, torch.nan) for t in (x, x, *parameters))
    kernels.forward(x, parameters, out, case.groups)
    backward_kernels.backward(grad, x, parameters, gradients[0], gradients[1:], case.groups)
    return [out, *gradients]


def _expected(case: Case, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = case.run(leaves, "eager")
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def _check(case: Case, dtype: torch.dtype, device: str) -> None:
    inputs = [t.detach() for t in case.inputs(dtype, device)]
    torch.manual_seed(1)
    grad = torch.randn_like(inputs[0])
    got = _run(case, inputs, grad)
    eager = _expected(case, inputs, grad)
    exact = _expected(case, [t.double() for t in inputs], grad)
    names = ["out", *(f"gradient of input {i}" for i in range(len(inputs)))]
    for what, *three in zip(names, got, eager, exact, strict=True):
        assert_parity(*three, what, dtype)
    assert all(map(torch.equal, inputs, case.inputs(dtype, device)))


@pytest.mark.parametrize(("name", "dtype"), PARITY)
def test_parity(
    name: str,
    dtype: torch.dtype,
    interpreter: None,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if math.prod(CASES[name].shape) > QUICK_NUMBERS:  # tiles as for a large batch, that are fewer
        monkeypatch.setattr(kernels, "PROGRAMS", 1)
    _check(CASES[name], dtype, device)


@pytest.mark.full
@pytest.mark.parametrize("programs", [1, 64])
def test_sums_in_one_part_and_in_several(
    programs: int, interpreter: None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", 1)  # and with tiles that reach beyond the map
    monkeypatch.setattr(backward_kernels, "SUM_PROGRAMS", programs)
    _check(CASES["odd-tokens"], torch.float32, device)


def _constants(kernel: str, x: Tensor, groups: int, small: bool) -> dict[str, Any]:
    of_maps = kernels.layout(x, groups)
    block_o = kernels.block_outputs(x.shape[1] // groups)
    block_p = 16 if small else kernels.tile_pixels(x)
    of_pixels = {"_taps": backward_kernels.SUM_PIXELS, "_mix": backward_kernels.mix_pixels(x)}
    return {
        "VECTOR": of_maps["VECTOR"],
        "CHANNELS_LAST": of_maps["CHANNELS_LAST"],
        "BLOCK_P": of_pixels.get(kernel, block_p),
        "BLOCK_O": block_o,
        "BLOCK_K": kernels.BLOCK_K,
        "BLOCK_C": backward_kernels.block_channels(x),
    }


KERNELS = ("", "_spread", "_gradient", "_taps", "_mix")
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAPS = ("x", "mix", "out", "grad_out", "grad_x", "through")
# (dtype, architecture, channels of a group, as tokens lie?, small tiles?): MiTPOSE-B and -L have
# groups of 48 and 64 channels, for which one kernel is compiled, and -H of 80.
WIDEST = [("bf16", 90, 80, True, False), ("fp32", 80, 80, True, False)]
ALL = [
    *itertools.product(("fp32", "bf16"), (80, 90), (48, 80), (False, True), (False, True)),
    *itertools.product(("fp16",), (80, 90), (7,), (False, True), (False,)),
]


@pytest.mark.parametrize("chosen", [WIDEST, pytest.param(ALL, marks=pytest.mark.full)])
def test_compiles_within_its_budget(chosen: Sequence[Any]) -> None:
    variants: list[dict[str, Any]] = []
    for kernel, (dtype, arch, group, tokens, small) in itertools.product(KERNELS, chosen):
        x = torch.empty(1, 16 * group, 16, 12, dtype=TYPES[dtype], device="meta")
        x = x.to(memory_format=torch.channels_last) if tokens else x
        variant = {
            "name": f"_multi_granularity{kernel}_kernel",
            "module": "multi_granularity" + ("_backward" if kernel else ""),
            "dtype": dtype,
            "arch": arch,
            "constants": _constants(kernel, x, 16, small),
            "options": kernels.OPTIONS,
            "types": dict.fromkeys(("packed", "mix_bias", "partial"), "*fp32")
            | dict.fromkeys(MAPS, f"*{dtype}"),
        }
        if variant not in variants:
            variants.append(variant)
    used = compile_all(variants)
    assert len(used) == len(variants)
    for variant, usage in zip(variants, used, strict=True):
        assert usage["registers"] <= kernels.REGISTERS, (variant, usage)
        assert usage["spilled"] == 0 and usage["shared"] <= kernels.SHARED, (variant, usage)
