"""spatial_gate's Triton kernels against the reference in float64, and compiled ahead of time."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from kernelpose.triton_kernels import maps
from kernelpose.triton_kernels import spatial_gate as kernels
from torch import Tensor

from kernelpose.reference.spatial_gate import spatial_gate
from tests.ops.test_spatial_gate import CASES, Case
from tests.parity import assert_parity
from tests.triton.aot import compile_all
from tests.triton.cases import interpreted

# The interpreter computes bfloat16 wrongly; tests/ops has it where a GPU is.
DTYPES = [torch.float32, torch.float16]
NAMES = interpreted(CASES)


def _run(inputs: list[Tensor], grad: Tensor, case: Case) -> list[Tensor]:
    """out, and the gradients of x, weight and bias, of the Triton kernels."""
    x, weight, bias = (t.detach() for t in inputs)
    out, grad_x, *rest = (torch.full_like(t, torch.nan) for t in (x, x, weight, bias))
    statistics = weight.new_full((x.shape[0], case.groups, 2), torch.nan)
    scratch = weight.new_full((2 * x.shape[0] * x.shape[1],), torch.nan)
    limit = {0: -math.inf, 1: math.inf}.get(case.threshold)
    if limit is None:
        limit = math.log(case.threshold / (1 - case.threshold))
    kernels.forward(x, weight, bias, out, statistics, scratch, limit, case.eps)
    scratch.fill_(torch.nan)
    kernels.backward(grad, x, weight, bias, statistics, grad_x, *rest, scratch, limit)
    return [out, grad_x, *rest]


def _expected(case: Case, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = spatial_gate(*leaves, case.groups, case.threshold, case.eps)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_parity(name: str, dtype: torch.dtype, interpreter: None, device: str) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype, device)
    torch.manual_seed(1)
    grad = torch.randn_like(inputs[0])
    got = _run(inputs, grad, case)
    eager = _expected(case, inputs, grad)
    exact = _expected(case, [t.double() for t in inputs], grad)
    names = ("out", "gradient of x", "of weight", "of bias")
    for what, *three in zip(names, got, eager, exact, strict=True):
        assert_parity(*three, what, dtype)
    assert all(map(torch.equal, inputs, case.inputs(dtype, device)))


def test_deterministic(interpreter: None, device: str) -> None:
    case = CASES["odd-tokens"]
    inputs = case.inputs(torch.float16, device)
    grad = torch.ones_like(inputs[0])
    assert all(map(torch.equal, _run(inputs, grad, case), _run(inputs, grad, case)))


def test_more_numbers_than_a_sum_takes_at_once(
    interpreter: None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["odd-tokens"]
    inputs = case.inputs(torch.float32, device)
    grad = torch.ones_like(inputs[0])
    monkeypatch.setattr(kernels, "SUM_BLOCK", 4)
    monkeypatch.setattr(kernels, "PARAMETER_BLOCK", 16)
    for ours, expected in zip(_run(inputs, grad, case), _expected(case, inputs, grad), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


FLOATS = ("weight", "bias", "means", "squares", "statistics", "u0", "u1", "of_groups")
FLOATS += ("of_shares", "grad_weight", "grad_bias")


def _compile(name: str, runs: list[tuple[str, int, dict[str, Any]]], shared: int) -> None:
    """runs: (dtype, architecture, constants)."""
    options = kernels.OPTIONS if "VECTOR" in runs[0][2] else {}
    variants = [
        {
            "name": f"_spatial_gate_{name}_kernel",
            "module": "spatial_gate",
            "dtype": dtype,
            "arch": arch,
            "constants": constants,
            "options": options,
            "types": dict.fromkeys(FLOATS, "*fp32")
            | dict.fromkeys(("x", "out", "grad_out", "grad_x"), f"*{dtype}")
            | {"limit": "fp32", "eps": "fp32"},
        }
        for dtype, arch, constants in runs
    ]
    used = compile_all(variants)
    assert len(used) == len(variants)
    for variant, usage in zip(variants, used, strict=True):
        assert usage["registers"] <= kernels.REGISTERS, (variant, usage)
        assert usage["spilled"] == 0 and usage["shared"] <= shared, (variant, usage)


@pytest.mark.parametrize("kernel", ["moments", "output", "gradient_sums", "gradient"])
def test_compiles_within_its_budget(kernel: str) -> None:
    """MiTPOSE's maps and odd ones, in both memory formats, for both architectures."""
    runs = []
    for (dtype, size), arch, tokens, odd in itertools.product(
        (("fp32", 4), ("fp16", 2), ("bf16", 2)), (80, 90), (False, True), (False, True)
    ):
        if odd and dtype != "fp16":
            continue
        shape = (1, 42, 5, 7) if odd else (1, 768, 16, 12)
        x = torch.empty(shape, dtype={4: torch.float32, 2: torch.float16}[size], device="meta")
        x = x.to(memory_format=torch.channels_last) if tokens else x
        layout = (maps.layout if kernel == "moments" else kernels.pair_layout)(x)
        constants = {k: v for k, v in layout.items() if k.isupper()}
        if kernel != "moments":
            constants["SUM_BLOCK"] = kernels.SUM_BLOCK
        runs.append((dtype, arch, constants))
    _compile(kernel, runs, 16384)


@pytest.mark.parametrize("kernel", ["statistics", "group_gradients", "parameters"])
def test_small_kernels_compile_within_their_budget(kernel: str) -> None:
    constants = {"SUM_BLOCK": kernels.SUM_BLOCK}
    if kernel == "parameters":
        constants["BLOCK"] = kernels.PARAMETER_BLOCK
    _compile(kernel, [("fp32", arch, constants) for arch in (80, 90)], 4096)
