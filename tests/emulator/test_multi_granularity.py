"""csrc/cuda/multi_granularity*.cu on the emulator against the reference in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernelpose.ops._maps import native_shape
from tests.emulator import build
from tests.emulator.barriers import Right, barriers, check_removal
from tests.emulator.run import Call, EmulatorError, run
from tests.ops.test_multi_granularity import CASES, Case
from tests.parity import assert_parity

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # by dtype code
NAMES = ("small", "small-tokens", "odd", "odd-tokens", "a-channel-a-group", "one-pixel")
MORE = {
    # more tiles than blocks at once, several turns of 16 channels
    "tiles": Case((3, 48, 9, 14), 2),
    "tiles-tokens": Case((3, 40, 9, 13), 2, tokens=True),
    # vectors of pixels and of channels; low tiles, as a device with four multiprocessors needs them
    "vectors": Case((2, 34, 10, 16), 1),
    "vectors-tokens": Case((2, 64, 10, 12), 2, tokens=True),
    "low-tokens": Case((1, 48, 5, 12), 1, tokens=True),
}


@pytest.fixture(scope="module")
def module() -> Path:
    return build.extension()


def _as_it_lies(x: Tensor) -> Tensor:
    """A contiguous tensor of the same memory, which is what the emulator is given."""
    return x if x.is_contiguous() else x.permute(0, 2, 3, 1)


def _nothing(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan)


def _calls(
    case: Case, dtype: torch.dtype, module: Path
) -> tuple[Call, Call, dict[torch.dtype, list[Tensor]]]:
    """Forward and backward, what they write poisoned, and what they have to write: out, and the
    gradients of x and of the parameters."""
    x, *parameters = inputs = [t.detach() for t in case.inputs(dtype)]
    draw = torch.randn(case.shape, generator=torch.Generator().manual_seed(1))
    grad = torch.empty_like(x).copy_(draw)
    expected = {}
    for d in (dtype, torch.float64):
        leaves = [t.to(d if t is x or d == torch.float64 else t.dtype) for t in inputs]
        out = case.run([t.requires_grad_() for t in leaves], "eager")
        expected[d] = [out.detach(), *torch.autograd.grad(out, leaves, grad.to(d))]
    rest: tuple[Any, ...] = ((*native_shape(x), x.shape[3], case.groups), DTYPES.index(dtype))
    x_lies, grad_lies = _as_it_lies(x), _as_it_lies(grad)
    nothing, gradients = _nothing(x_lies), [_nothing(p) for p in parameters]
    size = run(module, [Call("cuda_multi_granularity_backward_workspace", rest)])[0].value
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8)  # NaN of any type
    forward = [x_lies, parameters, nothing, *rest, 0]
    backward = [grad_lies, x_lies, parameters, nothing, gradients, workspace, *rest, 0]
    calls = (
        ("cuda_multi_granularity_forward", forward),
        ("cuda_multi_granularity_backward", backward),
    )
    return Call(*calls[0]), Call(*calls[1]), expected


def _tensors(args: list[Any]) -> list[Tensor]:
    flat = (a if isinstance(a, list) else [a] for a in args)
    return [a for some in flat for a in some if isinstance(a, Tensor)]


def _run_deterministic(module: Path, call: Call, read: int, **settings: int) -> list[Tensor]:
    """What the call leaves in its tensors, the same with every seed; it only reads the first."""
    calls = [Call(call.function, call.args, {"seed": s, **settings}) for s in range(2)]
    first, other = (_tensors(r.args) for r in run(module, calls))
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[:read], _tensors(call.args), strict=False))
    return first


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_parity(name: str, dtype: torch.dtype, module: Path) -> None:
    _check_parity(CASES[name], dtype, module)


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(d, marks=() if d == torch.float16 else pytest.mark.full) for d in DTYPES],
    ids=str,
)
@pytest.mark.parametrize("name", MORE)
def test_parity_of_larger_maps(name: str, dtype: torch.dtype, module: Path) -> None:
    _check_parity(MORE[name], dtype, module)


def _check_parity(case: Case, dtype: torch.dtype, module: Path) -> None:
    forward, backward, expected = _calls(case, dtype, module)
    out = _run_deterministic(module, forward, 9)[-1]
    grad_x, *gradients, workspace = _run_deterministic(module, backward, 10)[10:]
    maps = [t if t.shape == case.shape else t.permute(0, 3, 1, 2) for t in (out, grad_x)]
    assert len(gradients) == 8 and not workspace.eq(0xFF).all()
    got = [*maps, *gradients]
    names = ("out", *(f"gradient of input {i}" for i in range(9)))
    for what, ours, eager, exact in zip(
        names, got, expected[dtype], expected[torch.float64], strict=True
    ):
        assert_parity(ours, eager, exact, what, dtype)


@pytest.mark.parametrize(
    ("name", "kilobytes"), [("vectors", 64), ("vectors", 50), ("vectors-tokens", 38)]
)
def test_less_at_a_time_where_shared_memory_is_small(
    name: str, kilobytes: int, module: Path
) -> None:
    """Fewer channels, and in the end lower tiles, give the same bits."""
    forward, _, _ = _calls(MORE[name], torch.float16, module)
    usual = _run_deterministic(module, forward, 9)
    small = _run_deterministic(module, forward, 9, shared_limit=kilobytes * 1024)
    assert torch.equal(usual[-1], small[-1])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 2, 2**30, False, 1, 1), 0), ((1, 97, 4, False, 2, 1), 0), ((1, 2, 4, False, 2, 1), 3)],
    ids=["elements", "channels of a group", "dtype"],
)
def test_what_it_cannot_do_is_an_error(shape: tuple[int, ...], dtype: int, module: Path) -> None:
    forward, _, _ = _calls(CASES["small"], torch.float32, module)
    with pytest.raises(EmulatorError, match="check_cuda"):  # ASan ends where it throws
        run(module, [Call(forward.function, [*forward.args[:3], shape, dtype, 0])])


@pytest.fixture(scope="module")
def right(module: Path) -> Right:
    """Calls that need every barrier, and what they leave when nothing is left out."""
    calls = _calls(Case((2, 32, 16, 26), 2, tokens=True), torch.float16, module)[:2]
    return [(call, run(module, [call])[0].args) for call in calls]


OWN = [
    barrier
    for barrier in barriers("multi_granularity", "__syncthreads")
    if barrier.startswith("multi_granularity")
]


@pytest.mark.parametrize("barrier", OWN)
def test_removed_barrier_is_caught(barrier: str, module: Path, right: Right) -> None:
    check_removal(barrier, module, right)
