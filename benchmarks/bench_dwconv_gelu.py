"""dwconv_gelu on the hidden tokens of HRPVT's stages; eager is what PVT v2's code does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.both_ways import CompareBothWays
from benchmarks.setup import parameters

# Title: ((channels, size), batches on a CPU)
CASES = {
    "stage 1, 512 on 64x48": ((512, (64, 48)), (1, 8)),
    "stage 2, 1024 on 32x24": ((1024, (32, 24)), (1, 8)),
    "stage 3, 1280 on 16x12": ((1280, (16, 12)), (1, 8)),
    "stage 4, 2048 on 8x6": ((2048, (8, 6)), (1, 8)),
}


@pytest.mark.parametrize(("case", "batch", "dtype"), parameters(CASES))
def bench_dwconv_gelu(
    case: tuple[int, tuple[int, int]],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compare_both_ways: CompareBothWays,
) -> None:
    channels, size = case
    tokens = batch * size[0] * size[1]

    def inputs() -> list[Tensor]:
        shapes = ((batch, size[0] * size[1], channels), (channels, 1, 3, 3), (channels,))
        return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]

    def least(backward: bool) -> tuple[int, int]:
        """x and the gradients once; a convolution forward, three backward."""
        maps, convolutions = (3, 3) if backward else (2, 1)
        return maps * tokens * channels * dtype.itemsize, convolutions * 18 * tokens * channels

    compare_both_ways("dwconv_gelu", inputs, {"size": size}, least)
