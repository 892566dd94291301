"""csrc/cuda/grn.cu on the emulator against the reference in float64.

Its barriers are those of channel_passes.cuh, which test_channel_fuse.py leaves out one by one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernelpose.ops._maps import native_shape
from kernelpose.reference.grn import grn
from tests.emulator import build
from tests.emulator.run import Call, EmulatorError, run
from tests.ops.test_grn import CASES, Case
from tests.parity import assert_parity

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # by dtype code
NAMES = ("small", "small-tokens", "odd", "odd-tokens", "one-pixel", "one-channel")
MORE = {  # several blocks an image, the last in part, and several vectors a thread
    "blocks": Case((2, 72, 12, 10), eps=0.1),
    "blocks-tokens": Case((2, 72, 12, 10), tokens=True, eps=0.1),
}


@pytest.fixture(scope="module")
def module() -> Path:
    return build.extension()


def _as_it_lies(x: Tensor) -> Tensor:
    """A contiguous tensor of the same memory, which is what the emulator is given."""
    return x if x.is_contiguous() else x.permute(0, 2, 3, 1)


def _calls(case: Case, dtype: torch.dtype) -> tuple[Call, Call, dict[torch.dtype, list[Tensor]]]:
    """Forward and backward, what they write poisoned, and what they have to write: out, and the
    gradients of x, gamma and beta."""
    x, gamma, beta = inputs = [t.detach() for t in case.inputs(dtype)]
    grad = torch.empty_like(x).copy_(
        torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    )
    expected = {}
    for d in (dtype, torch.float64):
        leaves = [t.to(d if t is x or d == torch.float64 else t.dtype) for t in inputs]
        out = grn(*(t.requires_grad_() for t in leaves), case.eps)
        expected[d] = [out.detach(), *torch.autograd.grad(out, leaves, grad.to(d))]
    norms = x.float().norm(dim=(2, 3))
    written = [torch.full(s, torch.nan) for s in (norms.shape, (3, *norms.shape))]
    nothing = _as_it_lies(torch.full_like(x, torch.nan))
    x_lies, grad_lies = _as_it_lies(x), _as_it_lies(grad)
    rest = ((*native_shape(x), case.eps), DTYPES.index(dtype), 0)
    forward = [x_lies, gamma, beta, nothing, written[0], *rest]
    backward = [grad_lies, x_lies, gamma, norms, written[1], nothing, *rest]
    return Call("cuda_grn_forward", forward), Call("cuda_grn_backward", backward), expected


def _run_deterministic(module: Path, call: Call, read: int) -> list[Tensor]:
    """What the call leaves in its tensors, the same with every seed; it only reads the first."""
    results = run(module, [Call(call.function, call.args, {"seed": s}) for s in range(2)])
    first, other = ([t for t in r.args if isinstance(t, Tensor)] for r in results)
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[:read], call.args, strict=False))
    return first


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_parity(name: str, dtype: torch.dtype, module: Path) -> None:
    case = (CASES | MORE)[name]
    forward, backward, expected = _calls(case, dtype)
    *_, out, norms = _run_deterministic(module, forward, 3)
    *_, given_norms, sums, grad_x = _run_deterministic(module, backward, 4)
    torch.testing.assert_close(norms, given_norms)
    maps = (t if t.shape == case.shape else t.permute(0, 3, 1, 2) for t in (out, grad_x))
    got = [*maps, sums[2].sum(0), sums[1].sum(0)]
    names = ("out", "gradient of x", "of gamma", "of beta")
    for what, ours, eager, exact in zip(
        names, got, expected[dtype], expected[torch.float64], strict=True
    ):
        assert_parity(ours, eager, exact, what, dtype)


def test_other_dtypes_are_an_error(module: Path) -> None:
    forward, _, _ = _calls(CASES["small"], torch.float32)
    args = [3 if i == 6 else a for i, a in enumerate(forward.args)]
    with pytest.raises(EmulatorError, match="check_cuda"):  # ASan ends where it throws
        run(module, [Call(forward.function, args)])
