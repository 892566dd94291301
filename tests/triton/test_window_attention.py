"""window_attention's Triton kernels against the float64 reference; see conftest.py for where."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.ops.test_window_attention import CASES, Case
from tests.parity import assert_parity

MORE = {
    "shifted-tiles": Case((20, 24), 1, 16, window=(16, 12), shift=(8, 6), pooled=True, batch=1),
    "tiles-bias": Case((10, 12), 1, 32, bias=True, batch=1),
    "many-pools": Case((17, 10), 1, 20, window=(4, 2), shift=(2, 0), pooled=True, batch=1),
    "grid-tiles": Case((20, 24), 1, 36, window=(2, 2), partition="grid", batch=1),
}
SMALL = Case((5, 4), 1, 16, window=(3, 2), shift=(1, 1), bias=True, pooled=True)
# The interpreter computes bfloat16 wrongly; tests/ops has it where a GPU is.
DTYPES = (torch.float32, torch.float16)


def _run(
    kernels: ModuleType, case: Case, inputs: list[Tensor], grad: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(out, lse, gradients) of the Triton kernels."""
    qkv, *bias = (x.detach() for x in inputs)
    table = bias[0] if bias else None
    window = case.window or case.size
    options = (case.heads, window, case.shift, case.partition, case.pooled)
    options += (scale or case.head_dim**-0.5,)
    out, lse = kernels.forward(qkv, table, *options)
    grad_qkv, grad_bias = kernels.backward(grad, qkv, table, out, lse, *options)
    assert (grad_bias is None) == (table is None)
    return out, lse, [grad_qkv] if grad_bias is None else [grad_qkv, grad_bias]


# Seconds each in float32 already; float16 has others of every partition.
SLOW = ("shifted", "shifted-tiles", "odd", "odd-one-axis", "grid-odd")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name,
            dtype,
            marks=pytest.mark.full if name in SLOW and dtype == torch.float16 else (),
            id=f"{name}-{str(dtype)[6:]}",
        )
        for name in (*CASES, *MORE)
        for dtype in DTYPES
    ],
)
def test_parity(
    name: str, dtype: torch.dtype, kernels: ModuleType, device: str, poisoned: None
) -> None:
    case = (CASES | MORE)[name]
    inputs = case.inputs(dtype, device)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    generator = torch.Generator().manual_seed(1)
    shape = (*inputs[0].shape[:3], case.heads * case.head_dim)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    kept = [x.detach().clone() for x in inputs]
    out, lse, gradients = _run(kernels, case, inputs, grad)

    assert out.dtype == dtype
    assert lse.shape == (shape[0], case.heads, *case.size) and lse.dtype == torch.float32
    assert lse.isfinite().all()
    exact, eager = case.run(exact_inputs, "eager"), case.run(inputs, "eager")
    assert_parity(out, eager, exact, "out")
    exact_gradients = torch.autograd.grad(exact, exact_inputs, grad.double())
    eager_gradients = torch.autograd.grad(eager, inputs, grad)
    names = ("gradient of qkv", "gradient of bias_table")
    for what, *three in zip(names, gradients, eager_gradients, exact_gradients, strict=False):
        assert_parity(*three, what, dtype)
    for x, copy in zip(inputs, kept, strict=True):
        assert torch.equal(x, copy), "an input was written"


def test_lse_and_scale(kernels: ModuleType, device: str) -> None:
    """lse is the natural log-sum-exp of the scaled scores, whatever the scale."""
    case = Case((4, 5), 2, 20)
    inputs = case.inputs(torch.float32, device)
    grad = torch.zeros(2, 4, 5, 40, device=device)
    _, lse, _ = _run(kernels, case, inputs, grad, scale=0.7)
    q, k, _ = inputs[0].detach().double().reshape(2, 20, 3, 2, 20).permute(2, 0, 3, 1, 4)
    expected = (0.7 * q @ k.transpose(-2, -1)).logsumexp(-1).reshape(2, 2, 4, 5)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, about the rows nobody stores
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("case", [SMALL, Case((7, 10), 1, 16)], ids=["one-tile", "tiles"])
def test_scores_far_from_zero_do_not_overflow(
    case: Case, sign: int, kernels: ModuleType, device: str
) -> None:
    """Nor do the rows and columns of a tile that stand for no token."""
    qkv, *bias = (60 * x.detach() for x in case.inputs(torch.float32, device))
    q, k, _ = qkv.unflatten(-1, (3, -1)).unbind(3)
    q.abs_()
    k.abs_().mul_(sign)
    inputs = [x.requires_grad_() for x in (qkv, *bias)]
    grad = torch.ones(*qkv.shape[:3], case.head_dim, device=device)
    out, lse, gradients = _run(kernels, case, inputs, grad)
    assert (lse * sign).min() > 500  # exp overflows at 88
    assert all(x.isfinite().all() for x in (out, lse, *gradients))
    exact = case.run([x.detach().double() for x in inputs], "eager")
    assert_parity(out, case.run(inputs, "eager"), exact)


def test_backward_is_deterministic(kernels: ModuleType, device: str) -> None:
    case = SMALL
    inputs = case.inputs(torch.float16, device)
    grad = torch.ones(2, *case.size, case.heads * case.head_dim, device=device, dtype=torch.float16)
    first, second = (_run(kernels, case, inputs, grad)[2] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
