"""csrc/cuda/add_layer_norm.cu on the emulator against the reference in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernelpose.reference.add_layer_norm import add_layer_norm
from tests.emulator import build
from tests.emulator.barriers import Right, barriers, check_removal
from tests.emulator.run import Call, EmulatorError, run
from tests.ops.test_add_layer_norm import Case
from tests.parity import assert_parity

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
TYPES = {  # of x, of the residual, of the parameters
    "float32": (torch.float32, torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.float32),
    "float16 beside float32": (torch.float16, torch.float32, torch.bfloat16),
    "bfloat16 beside float32": (torch.bfloat16, torch.float32, torch.float32),
}
CASES = {
    "several rows a warp": Case((5, 8)),
    "pvt-1": Case((3, 13, 64)),
    "pvt-3": Case((7, 320), mean=3.0),
    "vitpose": Case((2, 5, 768)),
    "vitpose-huge": Case((3, 1280)),
    "a block a row": Case((2, 2064)),
    "odd": Case((3, 37), eps=0.1),
    "odd, many rows a block": Case((270, 5)),
    "many rows a block": Case((8500, 4)),
}
RESULTS = ("sum", "norm", "gradient of x", "of residual", "of weight", "of bias")


@pytest.fixture(scope="module")
def module() -> Path:
    return build.extension()


def _calls(
    case: Case, types: str, given: bool = True
) -> tuple[Call, Call, dict[str, list[Tensor]]]:
    """Forward and backward, what they write poisoned, and the RESULTS to come, in the same dtypes
    and in float64. given: is there a gradient of the sum?"""
    of_x, of_sum, of_parameters = TYPES[types]
    x, residual, weight, bias = (t.detach() for t in case.inputs(torch.float32))
    inputs = [x.to(of_x), residual.to(of_sum), weight.to(of_parameters), bias.to(of_parameters)]
    grads = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1)).to(of_sum)
    expected = {}
    for which, widen in (("eager", False), ("exact", True)):
        leaves = [(t.double() if widen else t.clone()).requires_grad_() for t in inputs]
        results = add_layer_norm(*leaves, case.eps)
        ones = [grads[0].to(results[0].dtype) * given, grads[1].to(results[0].dtype)]
        expected[which] = [
            *(t.detach() for t in results),
            *torch.autograd.grad(results, leaves, ones),
        ]
    total = expected["eager"][0]
    wide = total.double()
    variance, mean = torch.var_mean(wide, -1, correction=0)
    moments = torch.stack([mean, (variance + case.eps).rsqrt()]).float()

    def nothing(like: Tensor) -> Tensor:
        return torch.full_like(like, torch.nan)

    rows, channels = x.numel() // x.shape[-1], x.shape[-1]
    shape = (rows, channels, case.eps)
    codes = tuple(CODES[d] for d in TYPES[types])
    width = 4 if of_sum == torch.float32 else 8
    vectors = -(-channels // width)
    lanes = next((n for n in (4, 8, 16) if vectors <= 3 * n), 32)
    if vectors > 32 * (10 if width == 4 else 6):
        lanes = 128
    blocks = min(-(-rows // (128 // lanes)), 264)
    forward = [*inputs, nothing(total), nothing(total), nothing(moments)]
    backward = [
        grads[0] if given else 0,
        *(grads[1], total, moments, inputs[2]),
        nothing(total),
        nothing(x.to(of_x)) if of_x != of_sum else 0,
        torch.full((blocks, 2, channels), torch.nan),
    ]
    return (
        Call("cuda_add_layer_norm_forward", [*forward, shape, codes, 0]),
        Call("cuda_add_layer_norm_backward", [*backward, shape, codes, 0]),
        expected,
    )


def _check(module: Path, case: Case, given: bool = True) -> None:
    """All types in one process: what calls leave is right, the same with every seed, and beside
    what they read."""
    made = {types: _calls(case, types, given) for types in TYPES}
    calls = [call for *both, _ in made.values() for call in both]
    seeds = [
        run(module, [Call(c.function, c.args, {"seed": seed}) for c in calls]) for seed in range(2)
    ]
    for results in zip(*seeds, strict=True):
        for arguments in zip(*(r.args for r in results), strict=True):
            assert not isinstance(arguments[0], Tensor) or torch.equal(*arguments)
    after = iter(r.args for r in seeds[0])
    for types, (forward, backward, expected) in made.items():
        *_, total, norm, moments = _unread(next(after), forward, 4)[:7]
        torch.testing.assert_close(moments, backward.args[3])
        *_, grad_residual, grad_x, parts = _unread(next(after), backward, 5)[:8]
        grad_x = grad_x if isinstance(grad_x, Tensor) else grad_residual
        got = [total, norm, grad_x, grad_residual, *parts.sum(0)]
        of_x, of_sum, _ = TYPES[types]
        dtypes = (of_sum, of_sum, of_x, of_sum, of_sum, of_sum)
        for what, ours, eager, exact, dtype in zip(
            RESULTS, got, expected["eager"], expected["exact"], dtypes, strict=True
        ):
            assert_parity(ours, eager, exact, f"{types}, {what}", dtype)


def _unread(after: list[Any], call: Call, read: int) -> list[Any]:
    """Arguments after a call, which only reads the first of them."""
    for now, before in zip(after[:read], call.args, strict=False):
        assert not isinstance(now, Tensor) or torch.equal(now, before)
    return after


@pytest.mark.parametrize("name", list(CASES)[:-1])
def test_parity(name: str, module: Path) -> None:
    _check(module, CASES[name])


@pytest.mark.full
def test_many_rows_a_block(module: Path) -> None:
    _check(module, CASES["many rows a block"])


def test_no_gradient_of_the_sum(module: Path) -> None:
    _check(module, CASES["pvt-1"], given=False)


def test_moments_are_not_written_where_they_are_not_wanted(module: Path) -> None:
    forward, _, expected = _calls(CASES["odd"], "float32")
    (result,) = run(module, [Call(forward.function, [*forward.args[:6], 0, *forward.args[7:]])])
    assert_parity(result.args[5], expected["eager"][1], expected["exact"][1])


def test_parts_are_counted(module: Path) -> None:
    backward = [_calls(case, types)[1] for case in CASES.values() for types in TYPES]
    results = run(module, [Call("cuda_add_layer_norm_parts", c.args[8:10]) for c in backward])
    assert [r.value for r in results] == [len(c.args[7]) for c in backward]


@pytest.mark.parametrize("codes", [(3, 3, 0), (0, 1, 0), (0, 0, 3)])
def test_other_types_are_an_error(codes: tuple[int, int, int], module: Path) -> None:
    forward, _, _ = _calls(CASES["odd"], "float32")
    with pytest.raises(EmulatorError, match="check_cuda"):  # ASan ends where it throws
        run(module, [Call(forward.function, [*forward.args[:8], codes, 0])])


@pytest.fixture(scope="module")
def right(module: Path) -> Right:
    """Calls that need every barrier, and what they leave when nothing is left out."""
    calls = [
        call
        for name, types in (("pvt-1", "float16"), ("a block a row", "float32"))
        for call in _calls(CASES[name], types)[:2]
    ]
    return [(call, list(run(module, [call])[0].args)) for call in calls]


@pytest.mark.parametrize("barrier", barriers("add_layer_norm", "__syncthreads"))
def test_removed_barrier_is_caught(barrier: str, module: Path, right: Right) -> None:
    check_removal(barrier, module, right)
