"""add_layer_norm's Triton kernels against the reference in float64, and compiled ahead of time."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernelpose.triton_kernels import add_layer_norm as kernels
from torch import Tensor

from kernelpose.reference.add_layer_norm import add_layer_norm
from tests.ops.test_add_layer_norm import CASES, Case
from tests.parity import assert_parity
from tests.triton.aot import compile_all
from tests.triton.cases import interpreted

# The interpreter computes bfloat16 wrongly; tests/ops has it where a GPU is.
DTYPES = {  # of x, and of the residual
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "float16 beside float32": (torch.float16, torch.float32),
}
RESULTS = ("sum", "norm", "gradient of x", "of residual", "of weight", "of bias")


def _run(inputs: list[Tensor], grads: list[Tensor], eps: float, given: bool) -> list[Tensor]:
    """The RESULTS of the Triton kernels."""
    x, residual, weight, bias = inputs
    total, norm, grad_residual = (torch.full_like(residual, torch.nan) for _ in range(3))
    grad_x = torch.full_like(x, torch.nan) if x.dtype != residual.dtype else None
    moments = torch.full((2, *x.shape[:-1]), torch.nan, device=x.device)
    kernels.forward(x, residual, weight, bias, total, norm, moments, eps)
    grad_parameters = torch.full((2, x.shape[-1]), torch.nan, device=x.device)
    kernels.backward(
        grads[0] if given else None,
        grads[1],
        total,
        moments,
        weight,
        grad_residual,
        grad_x,
        grad_parameters,
    )
    grad_x = grad_residual if grad_x is None else grad_x
    return [total, norm, grad_x, grad_residual, *grad_parameters]


def _expected(inputs: list[Tensor], grads: list[Tensor], eps: float, given: bool) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    results = add_layer_norm(*leaves, eps)
    first, second = ((g.to(results[0].dtype)) for g in grads)
    grads = [first if given else torch.zeros_like(first), second]
    return [*(t.detach() for t in results), *torch.autograd.grad(results, leaves, grads)]


def _check(
    case: Case, of_x: torch.dtype, of_residual: torch.dtype, device: str, given: bool
) -> None:
    x, residual, *parameters = (t.detach() for t in case.inputs(torch.float32, device))
    inputs = [x.to(of_x), residual.to(of_residual), *parameters]
    copies = [t.clone() for t in inputs]
    torch.manual_seed(1)
    grads = list(torch.randn(2, *x.shape, device=device).to(of_residual))
    got = _run(inputs, grads, case.eps, given)
    eager = _expected(inputs, grads, case.eps, given)
    exact = _expected([t.double() for t in inputs], grads, case.eps, given)
    dtypes = (of_residual, of_residual, of_x, *3 * [of_residual])
    for what, ours, same, ideal, dtype in zip(RESULTS, got, eager, exact, dtypes, strict=True):
        assert_parity(ours, same, ideal, what, dtype)
    assert all(map(torch.equal, inputs, copies))
    assert all(map(torch.equal, got, _run(inputs, grads, case.eps, given)))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", interpreted(CASES))
def test_parity(name: str, dtypes: str, interpreter: None, device: str) -> None:
    _check(CASES[name], *DTYPES[dtypes], device, given=True)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_many_tiles_a_program_and_no_gradient_of_the_sum(
    dtypes: str, interpreter: None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "PARTS", 2)
    monkeypatch.setattr(kernels, "TILE", 64)
    _check(CASES["large-eps"], *DTYPES[dtypes], device, given=False)


def test_without_moments(interpreter: None, device: str) -> None:
    x, residual, weight, bias = (t.detach() for t in CASES["odd"].inputs(torch.float32, device))
    total, norm = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    kernels.forward(x, residual, weight, bias, total, norm, None, 1e-5)
    for ours, expected in zip(
        (total, norm), add_layer_norm(x, residual, weight, bias, 1e-5), strict=True
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("kernel", ["", "_gradient"])
def test_compiles_within_its_budget(kernel: str) -> None:
    """Rows of ViTPose-B and of PVT v2, odd ones and the widest, for both architectures."""
    variants = []
    for (dtype, of_x), arch, channels in itertools.product(
        (("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"), ("fp32", "bf16")),
        (80, 90),
        (64, 768, 37, 8192),
    ):
        if dtype != "fp16" and channels != 768:
            continue
        kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
        layout = kernels.layout(torch.empty(192, channels, dtype=kind, device="meta"))
        constants = {k: v for k, v in layout.items() if k.isupper()}
        if kernel:
            constants |= {"grad_x": None} if of_x == dtype else {}
            constants |= {"grad_sum": None} if channels == 37 else {}
        elif channels == 64:
            constants["moments"] = None
        variants.append(
            {
                "name": f"_add_layer_norm{kernel}_kernel",
                "module": "add_layer_norm",
                "dtype": dtype,
                "arch": arch,
                "constants": constants,
                "options": {"num_warps": layout["num_warps"]},
                "types": dict.fromkeys(("x", "grad_x"), f"*{of_x}")
                | dict.fromkeys(
                    ("residual", "total", "norm", "grad_sum", "grad_norm", "grad_residual"),
                    f"*{dtype}",
                )
                | dict.fromkeys(("weight", "bias", "moments", "parts"), "*fp32")
                | {"eps": "fp32"},
            }
        )
    used = compile_all(variants)
    assert len(used) == len(variants)
    for variant, usage in zip(variants, used, strict=True):
        budget = kernels.REGISTERS[variant["options"]["num_warps"]]
        assert usage["registers"] <= budget, (variant, usage)
        assert usage["spilled"] == 0 and usage["shared"] <= 8192, (variant, usage)
