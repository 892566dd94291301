"""dual_gate's Triton kernels against the reference in float64, and compiled ahead of time."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernelpose.triton_kernels import dual_gate as kernels
from kernelpose.triton_kernels import maps
from torch import Tensor

from kernelpose.reference.dual_gate import dual_gate
from tests.ops.test_dual_gate import CASES
from tests.parity import assert_parity
from tests.triton.aot import compile_all
from tests.triton.cases import interpreted

# The interpreter computes bfloat16 wrongly; tests/ops has it where a GPU is.
DTYPES = [torch.float32, torch.float16]
NAMES = interpreted(CASES)


def _run(inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """out, and the gradients of y and of the weights, of the Triton kernels."""
    y, *weights = (t.detach() for t in inputs)
    channels, hidden = y.shape[1], weights[0].shape[0]
    out, grad_y = torch.full_like(y, torch.nan), torch.full_like(y, torch.nan)
    partials = weights[0].new_full((y.shape[0], channels + 2 * hidden + 98), torch.nan)
    state = kernels.forward(y, weights, out)
    kernels.backward(grad, y, weights, state, grad_y, partials)
    of_sigmoids, of_hidden, of_kernel = partials.split((channels, 2 * hidden, 98), 1)
    pooled = state[:, : 2 * channels].reshape(-1, channels)
    active = state[:, -2 * hidden :].relu().view(-1, 2, hidden).sum(1)
    products = [
        of_hidden.reshape(-1, hidden).t() @ pooled,
        of_sigmoids.t() @ active,
        of_kernel.sum(0),
    ]
    return [out, grad_y, *(p.view(w.shape) for p, w in zip(products, weights, strict=True))]


def _expected(inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = dual_gate(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_parity(name: str, dtype: torch.dtype, interpreter: None, device: str) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype, device)
    torch.manual_seed(1)
    grad = torch.randn_like(inputs[0])
    got = _run(inputs, grad)
    eager = _expected(inputs, grad)
    exact = _expected([t.double() for t in inputs], grad)
    names = ("out", "gradient of y", "of reduce_weight", "of expand_weight", "of spatial_weight")
    for what, *three in zip(names, got, eager, exact, strict=True):
        assert_parity(*three, what, dtype)
    assert all(map(torch.equal, inputs, case.inputs(dtype, device)))
    assert all(map(torch.equal, got, _run(inputs, grad)))


@pytest.mark.parametrize("kernel", ["peaks", "shares", "output", "gradient"])
def test_compiles_within_its_budget(kernel: str) -> None:
    """MiTPOSE's maps and odd ones, in both memory formats, for both architectures."""
    floats = ("of_rows", "of_columns", "row_largest", "column_largest", "row_gates", "column_gates")
    variants = []
    for (dtype, size), arch, tokens, odd in itertools.product(
        (("fp32", 4), ("fp16", 2), ("bf16", 2)), (80, 90), (False, True), (False, True)
    ):
        if odd and dtype != "fp16":
            continue
        shape = (1, 37, 5, 7) if odd else (1, 768, 16, 12)
        x = torch.empty(shape, dtype={4: torch.float32, 2: torch.float16}[size], device="meta")
        layout = maps.layout(x.to(memory_format=torch.channels_last) if tokens else x)
        variants.append(
            {
                "name": f"_dual_gate_{kernel}_kernel",
                "module": "dual_gate",
                "dtype": dtype,
                "arch": arch,
                "constants": {"VECTOR": layout["VECTOR"]} | kernels.BLOCKS,
                "options": kernels.OPTIONS,
                "types": dict.fromkeys(floats, "*fp32")
                | dict.fromkeys(("y", "out", "grad_out", "grad_y"), f"*{dtype}"),
            }
        )
    used = compile_all(variants)
    assert len(used) == len(variants)
    for variant, usage in zip(variants, used, strict=True):
        assert usage["registers"] <= kernels.REGISTERS, (variant, usage)
        assert usage["spilled"] == 0 and usage["shared"] <= 16384, (variant, usage)
