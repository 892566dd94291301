"""cascaded_attention on the stages of HEViTPose."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks.forward import Compare
from benchmarks.setup import parameters

# Title: ((rows, columns, channels of a group, reduction), batches); 4 groups of 2 heads
CASES = {
    "B stage 1, 64x48 d40": ((64, 48, 40, 8), (1, 8)),
    "B stage 2, 32x24 d64": ((32, 24, 64, 4), (1, 8)),
    "B stage 3, 16x12 d96": ((16, 12, 96, 2), (1, 8)),
    "S stage 1, 64x64 d32": ((64, 64, 32, 8), (1,)),
    "T stage 1, 64x48 d16": ((64, 48, 16, 8), (1,)),
    "T stage 3, 16x12 d48": ((16, 12, 48, 2), (1,)),
}
GROUPS, HEADS = 4, 2


@pytest.mark.parametrize(("case", "batch", "dtype"), parameters(CASES))
def bench_cascaded_attention(
    case: tuple[int, int, int, int],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compare: Compare,
) -> None:
    rows, columns, width, ratio = case
    channels = GROUPS * width

    def inputs() -> list[Tensor]:
        square, row = (GROUPS, width, width), (GROUPS, width)
        shapes = [(batch, rows, columns, channels), (channels, 1, ratio, ratio), (channels,)]
        shapes += [square, row, (GROUPS, 2 * width, width), (GROUPS, 2 * width), square, *3 * [row]]
        scales = [1, 1 / ratio, 1, *(width**-0.5 if len(s) == 3 else 1 for s in shapes[3:])]
        drawn = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
        return [scale * tensor for scale, tensor in zip(scales, drawn, strict=True)]

    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    compare(
        "cascaded_attention",
        inputs,
        {"num_heads": HEADS},
        bytes=2 * batch * rows * columns * channels * dtype.itemsize,
        same=functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance),
    )
