"""grn's Triton kernels against the reference in float64, and compiled ahead of time."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernelpose.triton_kernels import grn as kernels
from kernelpose.triton_kernels import maps
from torch import Tensor

from kernelpose.reference.grn import grn
from tests.ops.test_grn import CASES, Case
from tests.parity import assert_parity
from tests.triton.aot import compile_all
from tests.triton.cases import interpreted

# The interpreter computes bfloat16 wrongly; tests/ops has it where a GPU is.
DTYPES = [torch.float32, torch.float16]
NAMES = interpreted(CASES)


def _run(inputs: list[Tensor], grad: Tensor, eps: float) -> list[Tensor]:
    """out, and the gradients of x, gamma and beta, of the Triton kernels."""
    x, gamma, beta = (t.detach() for t in inputs)
    out, grad_x = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    norms, sums = (
        gamma.new_full(x.shape[:2], torch.nan),
        gamma.new_full((3, *x.shape[:2]), torch.nan),
    )
    kernels.forward(x, gamma, beta, out, norms, eps)
    kernels.backward(grad, x, gamma, norms, sums, grad_x, eps)
    return [out, grad_x, sums[2].sum(0), sums[1].sum(0)]


def _expected(case: Case, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = grn(*leaves, case.eps)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_parity(name: str, dtype: torch.dtype, interpreter: None, device: str) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype, device)
    torch.manual_seed(1)
    grad = torch.randn_like(inputs[0])
    got = _run(inputs, grad, case.eps)
    eager = _expected(case, inputs, grad)
    exact = _expected(case, [t.double() for t in inputs], grad)
    names = ("out", "gradient of x", "of gamma", "of beta")
    for what, *three in zip(names, got, eager, exact, strict=True):
        assert_parity(*three, what, dtype)
    assert all(map(torch.equal, inputs, case.inputs(dtype, device)))
    assert all(map(torch.equal, got, _run(inputs, grad, case.eps)))


def test_more_channels_than_a_sum_takes_at_once(
    interpreter: None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["odd-tokens"]
    inputs = case.inputs(torch.float32, device)
    grad = torch.ones_like(inputs[0])
    monkeypatch.setattr(kernels, "SUM_BLOCK", 16)
    for ours, expected in zip(
        _run(inputs, grad, case.eps), _expected(case, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernel", ["norms", "output", "gradient_sums", "gradient"])
def test_compiles_within_its_budget(kernel: str) -> None:
    """MiTPOSE's maps and odd ones, in both memory formats, for both architectures."""
    floats = ("gamma", "beta", "norms", "products", "totals", "grad_gammas")
    variants = []
    for (dtype, size), arch, tokens, odd in itertools.product(
        (("fp32", 4), ("fp16", 2), ("bf16", 2)), (80, 90), (False, True), (False, True)
    ):
        if odd and dtype != "fp16":
            continue
        shape = (1, 37, 5, 7) if odd else (1, 768, 16, 12)
        x = torch.empty(shape, dtype={4: torch.float32, 2: torch.float16}[size], device="meta")
        layout = maps.layout(x.to(memory_format=torch.channels_last) if tokens else x)
        constants = {k: v for k, v in layout.items() if k.isupper()}
        if kernel in ("output", "gradient"):
            constants["SUM_BLOCK"] = kernels.SUM_BLOCK
        variants.append(
            {
                "name": f"_grn_{kernel}_kernel",
                "module": "grn",
                "dtype": dtype,
                "arch": arch,
                "constants": constants,
                "options": kernels.OPTIONS,
                "types": dict.fromkeys(floats, "*fp32")
                | dict.fromkeys(("x", "out", "grad_out", "grad_x"), f"*{dtype}")
                | {"eps": "fp32"},
            }
        )
    used = compile_all(variants)
    assert len(used) == len(variants)
    for variant, usage in zip(variants, used, strict=True):
        assert usage["registers"] <= kernels.REGISTERS, (variant, usage)
        assert usage["spilled"] == 0 and usage["shared"] <= 8192, (variant, usage)
