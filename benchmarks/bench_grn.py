"""grn on the map of MiTPOSE-B, as tokens lie and contiguous, against timm's layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.both_ways import CompareBothWays
from benchmarks.setup import parameters

CHANNELS = 768
# Title: is the map channels_last?
CASES = {
    "grn 768x16x12 tokens": (True, (1, 8)),
    "grn 768x16x12 contiguous": (False, (1, 8)),
}


def _timm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """GlobalResponseNorm of timm, in x's dtype."""
    norm = x.norm(p=2, dim=(2, 3), keepdim=True)
    response = norm / (norm.mean(dim=1, keepdim=True) + 1e-6)
    weight, bias = (p.to(x.dtype).view(1, -1, 1, 1) for p in (gamma, beta))
    return x + torch.addcmul(bias, weight, x * response)


@pytest.mark.parametrize(("tokens", "batch", "dtype"), parameters(CASES))
def bench_grn(
    tokens: bool,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compare_both_ways: CompareBothWays,
) -> None:
    def inputs() -> list[Tensor]:
        x = torch.randn(batch, CHANNELS, 16, 12, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if tokens else x
        return [x, *torch.randn(2, CHANNELS, device=device).unbind()]

    x = inputs()[0]
    # Forward x is read and the result written; backward both are read and a gradient written.
    compare_both_ways(
        "grn",
        inputs,
        {},
        lambda backward: ((3 if backward else 2) * x.nbytes, None),
        {"timm": _timm},
    )
