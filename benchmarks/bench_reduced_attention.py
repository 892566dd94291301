"""reduced_attention on the stages of PVT v2, against SDPA on views of the projections."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks.both_ways import CompareBothWays
from benchmarks.setup import parameters
from kernelpose.ops import reduced_attention

# Title: ((queries, keys, heads, head width), batches)
CASES = {
    "stage 1, 3072x48 d64": ((3072, 48, 1, 64), (1, 8)),
    "stage 2, 768x48 d64": ((768, 48, 2, 64), (1, 8)),
    "stage 3, 192x48 d64": ((192, 48, 5, 64), (1, 8)),
    "stage 4, 48x48 d64": ((48, 48, 8, 64), (1, 8)),
    "b0 stage 1, 3072x48 d32": ((3072, 48, 1, 32), (1,)),
    "b0 stage 3, 192x48 d32": ((192, 48, 5, 32), (1,)),
    "384 stage 1, 6912x108 d64": ((6912, 108, 1, 64), (1,)),
    "384 stage 2, 1728x108 d64": ((1728, 108, 2, 64), (1,)),
    "384 stage 3, 432x108 d64": ((432, 108, 5, 64), (1,)),
    "384 stage 4, 108x108 d64": ((108, 108, 8, 64), (1,)),
}


@pytest.mark.parametrize(("case", "batch", "dtype"), parameters(CASES))
def bench_reduced_attention(
    case: tuple[int, int, int, int],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compare_both_ways: CompareBothWays,
) -> None:
    queries, keys, heads, width = case
    channels = heads * width

    def inputs() -> list[Tensor]:
        shapes = ((batch, queries, channels), (batch, keys, 2 * channels))
        return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]

    def least(backward: bool) -> tuple[int, int]:
        """Every tensor once; 2 products forward, 5 backward."""
        rows = 3 * queries + 4 * keys if backward else 2 * queries + 2 * keys
        flops = (10 if backward else 4) * batch * queries * keys * channels
        return rows * batch * channels * dtype.itemsize, flops

    sdpa = functools.partial(reduced_attention, num_heads=heads, backend="torch")
    compare_both_ways("reduced_attention", inputs, {"num_heads": heads}, least, {"sdpa": sdpa})
