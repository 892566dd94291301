"""dwconv_gelu's Triton kernels against the reference in float64, and compiled ahead of time."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernelpose.triton_kernels import dwconv_gelu as kernels
from torch import Tensor

from kernelpose.reference.dwconv_gelu import dwconv_gelu
from tests.ops.test_dwconv_gelu import CASES, Case
from tests.parity import assert_parity
from tests.triton.aot import compile_all
from tests.triton.cases import interpreted

# The interpreter computes bfloat16 wrongly; tests/ops has it where a GPU is.
DTYPES = [torch.float32, torch.float16]
NAMES = interpreted(CASES)


def _run(case: Case, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """out, and the gradients of x, weight and bias, of the Triton kernels."""
    x, weight, bias = (t.detach() for t in inputs)
    out, grad_x = (torch.full_like(x, torch.nan) for _ in range(2))
    parts = kernels.parts(case.batch, case.size)
    partial = torch.full((parts, 10, case.channels), torch.nan, device=x.device)
    kernels.forward(x, weight, bias, out, case.size)
    kernels.backward(grad, x, weight, bias, partial, grad_x, case.size)
    return [out, grad_x, partial[:, :9].sum(0).t().reshape(weight.shape), partial[:, 9].sum(0)]


def _expected(case: Case, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = dwconv_gelu(*leaves, case.size)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_parity(
    name: str, dtype: torch.dtype, interpreter: None, device: str, poisoned: None
) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype, device)
    torch.manual_seed(1)
    grad = torch.randn_like(inputs[0])
    got = _run(case, inputs, grad)
    eager = _expected(case, inputs, grad)
    exact = _expected(case, [t.double() for t in inputs], grad)
    names = ("out", "gradient of x", "of weight", "of bias")
    for what, *three in zip(names, got, eager, exact, strict=True):
        assert_parity(*three, what, dtype)
    assert all(map(torch.equal, inputs, case.inputs(dtype, device)))


@pytest.mark.parametrize("kernel", ["forward", "inner_gradient", "gradient"])
def test_compiles_within_its_budget(kernel: str) -> None:
    """HRPVT's tokens and odd ones, for both architectures."""
    variants = []
    for (name, dtype), arch, odd in itertools.product(
        {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.items(),
        (80, 90),
        (False, True),
    ):
        if odd and name != "fp16":
            continue
        x = torch.empty(1, 3072, 37 if odd else 512, dtype=dtype, device="meta")
        constants = {k: v for k, v in kernels.layout(x, (64, 48)).items() if k.isupper()}
        variants.append(
            {
                "name": f"_dwconv_gelu_{kernel}_kernel",
                "module": "dwconv_gelu",
                "dtype": name,
                "arch": arch,
                "constants": constants,
                "options": kernels.OPTIONS,
                "types": dict.fromkeys(("weight", "bias", "g", "partial"), "*fp32")
                | dict.fromkeys(("x", "out", "grad_out", "grad_x"), f"*{name}"),
            }
        )
    used = compile_all(variants)
    assert len(used) == len(variants)
    for variant, usage in zip(variants, used, strict=True):
        assert usage["registers"] <= kernels.REGISTERS, (variant, usage)
        assert usage["spilled"] == 0 and usage["shared"] <= 16384, (variant, usage)
