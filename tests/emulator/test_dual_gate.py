"""csrc/cuda/dual_gate.cu on the emulator against the reference in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernelpose.ops._maps import native_shape
from kernelpose.reference.dual_gate import dual_gate
from tests.emulator import build
from tests.emulator.barriers import Right, barriers, check_removal
from tests.emulator.run import Call, EmulatorError, run
from tests.ops.test_dual_gate import CASES, Case
from tests.parity import assert_parity

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # by dtype code
NAMES = ("small", "small-tokens", "odd", "odd-tokens", "one-pixel", "one-channel")
MORE = {  # several blocks an image, several tiles a row, more hidden channels than a warp has lanes
    "blocks": Case((2, 40, 25, 16), 36),
    "blocks-tokens": Case((2, 328, 7, 6), 36, tokens=True),
}


@pytest.fixture(scope="module")
def module() -> Path:
    return build.extension()


def _as_it_lies(x: Tensor) -> Tensor:
    """A contiguous tensor of the same memory, which is what the emulator is given."""
    return x if x.is_contiguous() else x.permute(0, 2, 3, 1)


def _state(y: Tensor, weights: list[Tensor]) -> Tensor:
    """What the forward pass leaves for the backward pass, by plain PyTorch."""
    y = y.float()
    reduce, expand, spatial = weights
    pooled = [y.mean((2, 3)), y.amax((2, 3))]
    hidden = [p @ reduce.flatten(1).t() for p in pooled]
    of_channels = (sum(h.relu() for h in hidden) @ expand.flatten(1).t()).sigmoid()
    maps = torch.stack((y.mean(1), y.amax(1)), 1)
    of_pixels = torch.nn.functional.conv2d(maps, spatial, padding=3).sigmoid()
    return torch.cat((*pooled, maps.flatten(1), of_channels, of_pixels.flatten(1), *hidden), 1)


def _calls(case: Case, dtype: torch.dtype) -> tuple[Call, Call, dict[torch.dtype, list[Tensor]]]:
    """Forward and backward, what they write poisoned, and what they have to write: out, and the
    gradients of y and of the weights."""
    y, *weights = inputs = [t.detach() for t in case.inputs(dtype)]
    grad = torch.empty_like(y).copy_(
        torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    )
    expected = {}
    for d in (dtype, torch.float64):
        leaves = [t.to(d if t is y or d == torch.float64 else t.dtype) for t in inputs]
        out = dual_gate(*(t.requires_grad_() for t in leaves))
        expected[d] = [out.detach(), *torch.autograd.grad(out, leaves, grad.to(d))]
    nothing = _as_it_lies(torch.full_like(y, torch.nan))
    y_lies, grad_lies = _as_it_lies(y), _as_it_lies(grad)
    state = _state(y, weights)
    partials = torch.full((y.shape[0], y.shape[1] + 2 * case.hidden + 98), torch.nan)
    shape = (*native_shape(y), y.shape[3], case.hidden)
    rows = y.shape[2] * y.shape[3] if case.tokens else y.shape[1]
    columns = y[0].numel() // rows
    floats = -(-rows // 32) * 2 * columns + 2 * y.shape[1] + 3 * y[0, 0].numel()
    workspace = torch.full((y.shape[0], floats), torch.nan)
    rest = (workspace, shape, DTYPES.index(dtype), 0)
    forward = [y_lies, *weights, nothing, torch.full_like(state, torch.nan), *rest]
    backward = [grad_lies, y_lies, *weights, state, nothing, partials, *rest]
    return (
        Call("cuda_dual_gate_forward", forward),
        Call("cuda_dual_gate_backward", backward),
        expected,
    )


def _run_deterministic(module: Path, call: Call, read: int) -> list[Tensor]:
    """What the call leaves in its tensors, the same with every seed; it only reads the first."""
    results = run(module, [Call(call.function, call.args, {"seed": s}) for s in range(2)])
    first, other = ([t for t in r.args if isinstance(t, Tensor)][:-1] for r in results)
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[:read], call.args, strict=False))
    return first


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_parity(name: str, dtype: torch.dtype, module: Path) -> None:
    case = (CASES | MORE)[name]
    forward, backward, expected = _calls(case, dtype)
    *_, out, state = _run_deterministic(module, forward, 4)
    *_, given_state, grad_y, partials = _run_deterministic(module, backward, 6)
    torch.testing.assert_close(state, given_state)
    maps = [t if t.shape == case.shape else t.permute(0, 3, 1, 2) for t in (out, grad_y)]
    channels, hidden = case.shape[1], case.hidden
    of_sigmoids, of_hidden, of_kernel = partials.split((channels, 2 * hidden, 98), 1)
    active = state[:, -2 * hidden :].relu().view(-1, 2, hidden).sum(1)
    pooled = state[:, : 2 * channels].reshape(-1, channels)
    products = [
        of_hidden.reshape(-1, hidden).t() @ pooled, of_sigmoids.t() @ active, of_kernel.sum(0)
    ]  # fmt: skip
    eager, exact = expected[dtype], expected[torch.float64]
    got = [*maps, *(p.view(e.shape) for p, e in zip(products, exact[2:], strict=True))]
    names = ("out", "gradient of y", "of reduce_weight", "of expand_weight", "of spatial_weight")
    for what, *three in zip(names, got, eager, exact, strict=True):
        assert_parity(*three, what, dtype)


def test_the_workspace_is_as_large_as_it_says(module: Path) -> None:
    """What the tests above give is what the launcher asks for; less of it AddressSanitizer sees."""
    for name in ("blocks", "blocks-tokens"):
        forward, _, _ = _calls(MORE[name], torch.float32)
        workspace, shape = forward.args[6:8]
        (result,) = run(module, [Call("cuda_dual_gate_workspace", [shape])])
        assert result.value == workspace.nbytes


def test_other_dtypes_are_an_error(module: Path) -> None:
    forward, _, _ = _calls(CASES["small"], torch.float32)
    args = [3 if i == 8 else a for i, a in enumerate(forward.args)]
    with pytest.raises(EmulatorError, match="check_cuda"):  # ASan ends where it throws
        run(module, [Call(forward.function, args)])


@pytest.fixture(scope="module")
def right(module: Path) -> Right:
    """Calls that need every barrier, and what they leave when nothing is left out."""
    calls = _calls(MORE["blocks-tokens"], torch.float16)[:2]
    return [(call, run(module, [call])[0].args) for call in calls]


OWN = [
    barrier
    for barrier in barriers("dual_gate", "__syncthreads")
    if barrier.startswith(("dual_gate", "table"))
]


@pytest.mark.parametrize("barrier", OWN)
def test_removed_barrier_is_caught(barrier: str, module: Path, right: Right) -> None:
    check_removal(barrier, module, right)
