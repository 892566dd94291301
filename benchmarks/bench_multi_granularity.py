"""multi_granularity on the map of MiTPOSE-B, as tokens lie and contiguous."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.both_ways import CompareBothWays
from benchmarks.setup import parameters

CHANNELS, GROUPS = 768, 16
# Title: is the map channels_last?
CASES = {
    "local 768x16x12 tokens": (True, (1, 8)),
    "local 768x16x12 contiguous": (False, (1, 8)),
}


def _arguments(x: Tensor, *parameters: Tensor) -> tuple[Any, ...]:
    return x, parameters[:3], parameters[3:6], *parameters[6:]


@pytest.mark.parametrize(("tokens", "batch", "dtype"), parameters(CASES))
def bench_multi_granularity(
    tokens: bool,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compare_both_ways: CompareBothWays,
) -> None:
    def inputs() -> list[Tensor]:
        x = torch.randn(batch, CHANNELS, 16, 12, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if tokens else x
        weights = [torch.randn(CHANNELS, 1, k, k, device=device) / k for k in (7, 5, 3)]
        biases = torch.randn(4, CHANNELS, device=device).unbind()
        mix = torch.randn(CHANNELS, 3 * CHANNELS // GROUPS, 1, 1, device=device) / 12
        return [x, *weights, *biases[:3], mix, biases[3]]

    x = inputs()[0]
    products = x.numel() * (49 + 25 + 9 + 3 * CHANNELS // GROUPS)
    # Forward x is read and the result written; backward both are read and a gradient written. The
    # backward pass computes the gradients of two factors of every product.
    compare_both_ways(
        "multi_granularity",
        inputs,
        {"groups": GROUPS},
        lambda backward: (
            (3 if backward else 2) * x.nbytes,
            2 * products * (2 if backward else 1),
        ),
        arrange=_arguments,
    )
