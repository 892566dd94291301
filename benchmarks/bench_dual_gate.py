"""dual_gate on the map of MiTPOSE-B, as tokens lie and contiguous, against the released gates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.both_ways import CompareBothWays
from benchmarks.setup import parameters

CHANNELS = 768
# Title: is the map channels_last?
CASES = {
    "gates 768x16x12 tokens": (True, (1, 8)),
    "gates 768x16x12 contiguous": (False, (1, 8)),
}


def _released(y: Tensor, *weights: Tensor) -> Tensor:
    """The released code's gate modules, in y's dtype."""
    reduce, expand, spatial = (w.to(y.dtype) for w in weights)
    pooled = F.adaptive_avg_pool2d(y, 1), F.adaptive_max_pool2d(y, 1)
    mean, largest = (F.conv2d(F.relu(F.conv2d(p, reduce)), expand) for p in pooled)
    of_pixels = torch.cat((y.mean(1, keepdim=True), y.max(1, keepdim=True)[0]), 1)
    gate = torch.sigmoid(F.conv2d(of_pixels, spatial, padding=3))
    return torch.sigmoid(mean + largest) * y + gate * y


@pytest.mark.parametrize(("tokens", "batch", "dtype"), parameters(CASES))
def bench_dual_gate(
    tokens: bool,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compare_both_ways: CompareBothWays,
) -> None:
    def inputs() -> list[Tensor]:
        y = torch.randn(batch, CHANNELS, 16, 12, device=device, dtype=dtype)
        y = y.contiguous(memory_format=torch.channels_last) if tokens else y
        shapes = ((CHANNELS // 16, CHANNELS, 1, 1), (CHANNELS, CHANNELS // 16, 1, 1), (1, 2, 7, 7))
        weights = (torch.randn(shape, device=device) for shape in shapes)
        return [y, *(w / w[0].numel() ** 0.5 for w in weights)]

    y = inputs()[0]
    # Forward y is read and the result written; backward both are read and a gradient written.
    compare_both_ways(
        "dual_gate",
        inputs,
        {},
        lambda backward: ((3 if backward else 2) * y.nbytes, None),
        {"released": _released},
    )
