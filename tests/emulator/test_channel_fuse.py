"""csrc/cuda/channel_fuse.cu on the emulator against the reference in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernelpose.ops._maps import native_shape
from kernelpose.reference.channel_fuse import channel_fuse
from tests.emulator import build
from tests.emulator.barriers import Right, barriers, check_removal
from tests.emulator.run import Call, EmulatorError, run
from tests.ops.test_channel_fuse import CASES, Case
from tests.parity import assert_parity

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # by dtype code
NAMES = ("small", "small-tokens", "odd", "odd-pairwise", "odd-tokens", "one-pixel", "one-channel")
MORE = {  # several blocks an image, the last in part, and several vectors a thread
    "blocks": Case((2, 72, 12, 10), softmax="pairwise"),
    "blocks-tokens": Case((2, 72, 12, 10), tokens=True),
}


@pytest.fixture(scope="module")
def module() -> Path:
    return build.extension()


def _as_it_lies(x: Tensor) -> Tensor:
    """A contiguous tensor of the same memory, which is what the emulator is given."""
    return x if x.is_contiguous() else x.permute(0, 2, 3, 1)


def _calls(case: Case, dtype: torch.dtype) -> tuple[Call, Call, dict[torch.dtype, list[Tensor]]]:
    """Forward and backward, what they write poisoned, and what they have to write: out, and the
    gradients of y1 and y2."""
    inputs = [y.detach() for y in case.inputs(dtype)]
    draw = torch.randn(case.shape, generator=torch.Generator().manual_seed(1))
    grad = torch.empty_like(inputs[0]).copy_(draw)
    expected = {}
    for d in (dtype, torch.float64):
        leaves = [y.to(d).requires_grad_() for y in inputs]
        out = channel_fuse(*leaves, case.softmax)
        expected[d] = [out.detach(), *torch.autograd.grad(out, leaves, grad.to(d))]
    means = torch.stack([y.float().mean((2, 3)) for y in inputs], 1)
    nothing = [_as_it_lies(torch.full_like(grad, torch.nan)) for _ in range(2)]
    maps = [_as_it_lies(y) for y in inputs]
    shape = (*native_shape(inputs[0]), case.softmax == "pairwise")
    rest = (shape, DTYPES.index(dtype), 0)
    forward = [*maps, nothing[0], torch.full_like(means, torch.nan), *rest]
    products = torch.full_like(means, torch.nan)
    backward = [_as_it_lies(grad), *maps, means, products, *nothing, *rest]
    return (
        Call("cuda_channel_fuse_forward", forward),
        Call("cuda_channel_fuse_backward", backward),
        expected,
    )


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
    *_, out, means = _run_deterministic(module, forward, 2)
    *_, given_means, _, grad_y1, grad_y2 = _run_deterministic(module, backward, 4)
    torch.testing.assert_close(means, given_means)
    got = (t if t.shape == case.shape else t.permute(0, 3, 1, 2) for t in (out, grad_y1, grad_y2))
    names = ("out", "gradient of y1", "of y2")
    for what, ours, eager, exact in zip(
        names, got, expected[dtype], expected[torch.float64], strict=True
    ):
        assert_parity(ours, eager, exact, what, dtype)


def test_other_dtypes_are_an_error(module: Path) -> None:
    forward, _, _ = _calls(CASES["small"], torch.float32)
    args = [3 if i == 5 else a for i, a in enumerate(forward.args)]
    with pytest.raises(EmulatorError, match="check_cuda"):  # ASan ends where it throws
        run(module, [Call(forward.function, args)])


@pytest.fixture(scope="module")
def right(module: Path) -> Right:
    """Calls that need every barrier, and what they leave when nothing is left out."""
    calls = _calls(MORE["blocks-tokens"], torch.float16)[:2]
    return [(call, run(module, [call])[0].args) for call in calls]


OWN = [
    barrier
    for barrier in barriers("channel_fuse", "__syncthreads")
    if barrier.startswith("channel_")
]


@pytest.mark.parametrize("barrier", OWN)
def test_removed_barrier_is_caught(barrier: str, module: Path, right: Right) -> None:
    check_removal(barrier, module, right)
