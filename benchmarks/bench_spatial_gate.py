"""spatial_gate on the map of MiTPOSE-B, as tokens lie and contiguous, against the released code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.both_ways import CompareBothWays
from benchmarks.setup import parameters
from tests.ops.test_spatial_gate import Case

# Title: is the map channels_last?
CASES = {
    "spatial gate 768x16x12 tokens": (True, (1, 8)),
    "spatial gate 768x16x12 contiguous": (False, (1, 8)),
}


def _released(x: Tensor, weight: Tensor, bias: Tensor, total: Callable[..., Any]) -> Tensor:
    """SRU of the released MiTPOSE code, in x's dtype; total sums the weights, there in Python: a
    kernel for each of them."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    share = (weight / total(weight)).view(1, -1, 1, 1)
    gate = torch.sigmoid(F.group_norm(x, 4, weight, bias) * share)
    first = torch.where(gate > 0.5, torch.ones_like(gate), gate) * x
    second = torch.where(gate > 0.5, torch.zeros_like(gate), gate) * x
    (a, b), (c, d) = (torch.chunk(t, 2, 1) for t in (first, second))
    return torch.cat([a + d, b + c], 1)


@pytest.mark.parametrize(("tokens", "batch", "dtype"), parameters(CASES))
def bench_spatial_gate(
    tokens: bool,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compare_both_ways: CompareBothWays,
) -> None:
    case = Case((batch, 768, 16, 12), tokens=tokens)
    x = torch.empty(case.shape, dtype=dtype)
    # Forward x is read and the result written; backward both are read and a gradient written.
    compare_both_ways(
        "spatial_gate",
        lambda: case.inputs(dtype, device.type),
        {"groups": case.groups},
        lambda backward: ((3 if backward else 2) * x.nbytes, None),
        {".sum()": functools.partial(_released, total=Tensor.sum)},
        {"python sum": functools.partial(_released, total=sum)},
    )
