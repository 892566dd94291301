"""csrc/cuda/spatial_gate.cu on the emulator against the reference in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernelpose.ops._maps import native_shape
from kernelpose.reference.spatial_gate import spatial_gate
from tests.emulator import build
from tests.emulator.barriers import Right, barriers, check_removal
from tests.emulator.run import Call, EmulatorError, run
from tests.ops.test_spatial_gate import CASES, Case
from tests.parity import assert_parity

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # by dtype code
NAMES = ("small", "small-tokens", "odd", "odd-tokens", "odd-groups-tokens", "one-group")
NAMES += ("group-a-channel", "one-pixel")
MORE = {  # several turns of the warps and several steps of a lane
    "turns": Case((2, 88, 12, 14), eps=0.1),
    "turns-tokens": Case((2, 264, 4, 6), tokens=True, eps=0.1),
    "steps-tokens": Case((1, 16, 20, 20), groups=2, tokens=True),
}


@pytest.fixture(scope="module")
def module() -> Path:
    return build.extension()


def _as_it_lies(x: Tensor) -> Tensor:
    """A contiguous tensor of the same memory, which is what the emulator is given."""
    return x if x.is_contiguous() else x.permute(0, 2, 3, 1)


def _statistics(x: Tensor, case: Case) -> Tensor:
    groups = x.double().unflatten(1, (case.groups, -1)).flatten(2)
    deviation = (groups.var(-1, correction=0) + case.eps).rsqrt()
    return torch.stack((groups.mean(-1), deviation), -1).float()


def _calls(case: Case, dtype: torch.dtype) -> tuple[Call, Call, dict[torch.dtype, list[Tensor]]]:
    """Forward and backward, what they write poisoned, and what they have to write: out, and the
    gradients of x, weight and bias."""
    x, weight, bias = inputs = [t.detach() for t in case.inputs(dtype)]
    grad = torch.empty_like(x).copy_(
        torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    )
    expected = {}
    for d in (dtype, torch.float64):
        leaves = [t.to(d if t is x or d == torch.float64 else t.dtype) for t in inputs]
        out = spatial_gate(
            *(t.requires_grad_() for t in leaves), case.groups, case.threshold, case.eps
        )
        expected[d] = [out.detach(), *torch.autograd.grad(out, leaves, grad.to(d))]
    statistics, nothing = _statistics(x, case), _as_it_lies(torch.full_like(x, torch.nan))
    scratch = torch.full((2 * x.shape[0] * x.shape[1] + statistics.numel() // 2,), torch.nan)
    limit = math.log(case.threshold / (1 - case.threshold))
    x_lies, grad_lies = _as_it_lies(x), _as_it_lies(grad)
    rest = ((*native_shape(x), case.groups, limit, case.eps), DTYPES.index(dtype), 0)
    written = [torch.full_like(t, torch.nan) for t in (statistics, weight, bias)]
    forward = [x_lies, weight, bias, nothing, written[0], scratch, *rest]
    backward = [grad_lies, x_lies, weight, bias, statistics, nothing, *written[1:], scratch, *rest]
    calls = ("cuda_spatial_gate_forward", forward), ("cuda_spatial_gate_backward", backward)
    return Call(*calls[0]), Call(*calls[1]), expected


def _run_deterministic(module: Path, call: Call, read: int, **settings: int) -> list[Tensor]:
    """What the call leaves in its tensors, the same with every seed; it only reads the first."""
    calls = [Call(call.function, call.args, {"seed": s, **settings}) for s in range(2)]
    first, other = ([t for t in r.args if isinstance(t, Tensor)] for r in run(module, calls))
    assert all(torch.equal(a, b) for a, b in zip(first[:-1], other[:-1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[:read], call.args, strict=False))
    return first


def _check(got: list[Tensor], case: Case, expected: dict[torch.dtype, list[Tensor]]) -> None:
    names = ("out", "gradient of x", "of weight", "of bias")
    dtype = next(iter(expected))
    for what, ours, eager, exact in zip(
        names, got, expected[dtype], expected[torch.float64], strict=False
    ):
        maps = ours if ours.ndim == 1 or ours.shape == case.shape else ours.permute(0, 3, 1, 2)
        assert_parity(maps, eager, exact, what, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_parity(name: str, dtype: torch.dtype, module: Path) -> None:
    case = (CASES | MORE)[name]
    forward, backward, expected = _calls(case, dtype)
    *_, out, statistics, _ = _run_deterministic(module, forward, 3)
    *_, given, grad_x, grad_weight, grad_bias, _ = _run_deterministic(module, backward, 5)
    torch.testing.assert_close(statistics, given, rtol=1e-5, atol=1e-5)
    _check([out, grad_x, grad_weight, grad_bias], case, expected)


@pytest.mark.parametrize("name", ["turns", "turns-tokens"])
def test_units_that_shared_memory_cannot_keep(name: str, module: Path) -> None:
    """Read again from global memory, they give the same bits."""
    forward, _, expected = _calls(MORE[name], torch.float16)
    kept = _run_deterministic(module, forward, 3)
    read_again = _run_deterministic(module, forward, 3, shared_limit=48 * 1024)
    _check([read_again[3]], MORE[name], expected)
    assert torch.equal(kept[3], read_again[3]) and torch.equal(kept[4], read_again[4])


@pytest.mark.parametrize(
    ("position", "value"),
    [(0, (1, 2, 2**30, False)), (0, (1, 16386, 1, False)), (1, 3)],
    ids=["elements", "channels", "dtype"],
)
def test_what_it_cannot_do_is_an_error(position: int, value: object, module: Path) -> None:
    forward, _, _ = _calls(CASES["small"], torch.float32)
    args = [*forward.args]
    args[6 + position] = (*value, 1, 0.0, 1e-5) if isinstance(value, tuple) else value
    with pytest.raises(EmulatorError, match="check_cuda"):  # ASan ends where it throws
        run(module, [Call(forward.function, args)])


@pytest.fixture(scope="module")
def right(module: Path) -> Right:
    """Calls that need every barrier, and what they leave when nothing is left out."""
    calls = _calls(MORE["turns-tokens"], torch.float16)[:2]
    return [(call, run(module, [call])[0].args) for call in calls]


OWN = [
    barrier
    for barrier in barriers("spatial_gate", "__syncthreads")
    if barrier.startswith("spatial_gate")
]


@pytest.mark.parametrize("barrier", OWN)
def test_removed_barrier_is_caught(barrier: str, module: Path, right: Right) -> None:
    check_removal(barrier, module, right)
