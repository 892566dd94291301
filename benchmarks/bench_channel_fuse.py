"""channel_fuse on MiTPOSE-B's maps, as tokens lie and contiguous, against the released code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.both_ways import CompareBothWays
from benchmarks.setup import parameters

# Title: (are the maps channels_last?, softmax)
CASES = {
    "fuse 768x16x12 tokens": ((True, "joint"), (1, 8)),
    "fuse 768x16x12 contiguous": ((False, "joint"), (1, 8)),
    "fuse 768x16x12 tokens pairwise": ((True, "pairwise"), (1,)),
}


def _released(y1: Tensor, y2: Tensor) -> Tensor:
    """CRU's tail as the released code has it: on the concatenated maps."""
    both = torch.cat((y1, y2), 1)
    weighted = F.adaptive_avg_pool2d(both, 1).softmax(1) * both
    first, second = weighted.chunk(2, 1)
    return first + second


@pytest.mark.parametrize(("case", "batch", "dtype"), parameters(CASES))
def bench_channel_fuse(
    case: tuple[bool, str],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compare_both_ways: CompareBothWays,
) -> None:
    tokens, softmax = case
    layout = torch.channels_last if tokens else torch.contiguous_format

    def inputs() -> list[Tensor]:
        maps = torch.randn(2, batch, 768, 16, 12, device=device, dtype=dtype)
        return [y.contiguous(memory_format=layout) for y in maps]

    nbytes = inputs()[0].nbytes
    # Forward two maps are read and one written; backward three are read and two written.
    compare_both_ways(
        "channel_fuse",
        inputs,
        {"softmax": softmax},
        lambda backward: ((5 if backward else 3) * nbytes, None),
        {"released": _released} if softmax == "joint" else None,
    )
