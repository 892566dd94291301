"""channel_fuse's Triton kernels against the reference in float64, and compiled ahead of time."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernelpose.triton_kernels import channel_fuse as kernels
from kernelpose.triton_kernels import maps
from torch import Tensor

from kernelpose.reference.channel_fuse import channel_fuse
from tests.ops.test_channel_fuse import CASES, Case
from tests.parity import assert_parity
from tests.triton.aot import compile_all
from tests.triton.cases import interpreted

# The interpreter computes bfloat16 wrongly; tests/ops has it where a GPU is.
DTYPES = [torch.float32, torch.float16]
NAMES = interpreted(CASES)


def _run(case: Case, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """out, and the gradients of y1 and y2, of the Triton kernels."""
    y1, y2 = (y.detach() for y in inputs)
    out, grad_y1, grad_y2 = (torch.full_like(y1, torch.nan) for _ in range(3))
    shape = (y1.shape[0], 2, y1.shape[1])
    means, products = torch.full((2, *shape), torch.nan, device=y1.device).unbind()
    pairwise = case.softmax == "pairwise"
    kernels.forward(y1, y2, out, means, pairwise)
    kernels.backward(grad, y1, y2, means, products, grad_y1, grad_y2, pairwise)
    return [out, grad_y1, grad_y2]


def _expected(case: Case, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = channel_fuse(*leaves, case.softmax)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_parity(name: str, dtype: torch.dtype, interpreter: None, device: str) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype, device)
    torch.manual_seed(1)
    grad = torch.randn_like(inputs[0])
    got = _run(case, inputs, grad)
    eager = _expected(case, inputs, grad)
    exact = _expected(case, [t.double() for t in inputs], grad)
    for what, *three in zip(("out", "gradient of y1", "of y2"), got, eager, exact, strict=True):
        assert_parity(*three, what, dtype)
    assert all(map(torch.equal, inputs, case.inputs(dtype, device)))
    assert all(map(torch.equal, got, _run(case, inputs, grad)))


def test_more_channels_than_a_sum_takes_at_once(
    interpreter: None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["odd-tokens"]
    inputs = case.inputs(torch.float32, device)
    grad = torch.ones_like(inputs[0])
    monkeypatch.setattr(kernels, "SUM_BLOCK", 16)
    pairs = zip(_run(case, inputs, grad), _expected(case, inputs, grad), strict=True)
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["means", "output", "gradient_sums", "gradient"])
def test_compiles_within_its_budget(kernel: str) -> None:
    """MiTPOSE's maps and odd ones, in both memory formats, for both architectures."""
    weighs = kernel in ("output", "gradient")
    variants = []
    for (dtype, size), arch, tokens, odd, pairwise in itertools.product(
        (("fp32", 4), ("fp16", 2), ("bf16", 2)), (80, 90), *[(False, True)] * 3
    ):
        if (odd and dtype != "fp16") or (pairwise and (odd or not weighs)):
            continue
        shape = (1, 37, 5, 7) if odd else (1, 768, 16, 12)
        y = torch.empty(shape, dtype={4: torch.float32, 2: torch.float16}[size], device="meta")
        layout = maps.layout(y.to(memory_format=torch.channels_last) if tokens else y)
        constants = {k: v for k, v in layout.items() if k.isupper()}
        if weighs:
            constants |= {"PAIRWISE": pairwise, "SUM_BLOCK": kernels.SUM_BLOCK}
        variants.append(
            {
                "name": f"_channel_fuse_{kernel}_kernel",
                "module": "channel_fuse",
                "dtype": dtype,
                "arch": arch,
                "constants": constants,
                "options": kernels.OPTIONS,
                "types": dict.fromkeys(("means", "products"), "*fp32")
                | dict.fromkeys(("y1", "y2", "out", "grad_out"), f"*{dtype}")
                | dict.fromkeys(("grad_y1", "grad_y2"), f"*{dtype}"),
            }
        )
    used = compile_all(variants)
    assert len(used) == len(variants)
    for variant, usage in zip(variants, used, strict=True):
        assert usage["registers"] <= kernels.REGISTERS, (variant, usage)
        assert usage["spilled"] == 0 and usage["shared"] <= 8192, (variant, usage)
