"""What each of the core's kernels for inference alone is asked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import kernelpose
from kernelpose import _native

Calls = Callable[[Callable[[], Tensor]], tuple[Tensor, int]]


def calls_of(name: str) -> Calls:
    """A function -> its result, and how often it called the core's function `name`."""

    def calls(function: Callable[[], Tensor]) -> tuple[Tensor, int]:
        with mock.patch.object(_native, "call", wraps=_native.call) as call:
            found = function()
        return found, sum(each.args[0] == name for each in call.call_args_list)

    return calls


def check_who_gets_it(
    calls: Calls, times: int, module: nn.Module, *inputs: Any, tolerance: float = 2e-5
) -> None:
    """A module in eval mode runs it `times` in float32 without gradient: under no autocast, of no
    other type, where no backend is named and nothing traces."""
    x, *others = inputs
    with torch.no_grad():
        found, ran = calls(lambda: module(*inputs))
        assert ran == times
        with kernelpose.backend("eager"):
            expected, ran = calls(lambda: module(*inputs))
            assert ran == 0
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        with torch.autocast("cpu", torch.bfloat16):
            assert calls(lambda: module(*inputs))[1] == 0
        for dtype in (torch.bfloat16, torch.float64):
            other = copy.deepcopy(module).to(dtype)
            found, ran = calls(lambda other=other, dtype=dtype: other(x.to(dtype), *others))
            assert ran == 0 and found.dtype == dtype
    with_gradient, ran = calls(lambda: module(*inputs))
    assert ran == 0
    with_gradient.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    compiled, ran = calls(lambda: torch.compile(module, fullgraph=True, backend="eager")(*inputs))
    assert ran == 0
    torch.testing.assert_close(compiled, expected, rtol=tolerance, atol=tolerance)


def check_deterministic(function: Callable[[], Tensor]) -> None:
    """In inference mode, whatever the number of threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                results.append(function())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, results[0]) for other in results[1:])
