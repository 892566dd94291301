"""add_layer_norm on tokens of ViTPose-B and of the stages of PVT v2, against PyTorch's layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.both_ways import CompareBothWays
from benchmarks.setup import parameters

# Title: (tokens, channels).
CASES = {
    f"add_layer_norm {tokens}x{channels}": ((tokens, channels), (1, 8))
    for tokens, channels in ((192, 768), (3072, 64), (768, 128), (192, 320), (48, 512))
}


def _torch(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """In x's dtype, as a block has it that was converted to it."""
    total = x + residual
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return total, functional.layer_norm(total, weight.shape, weight, bias)


@pytest.mark.parametrize(("size", "batch", "dtype"), parameters(CASES))
def bench_add_layer_norm(
    size: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compare_both_ways: CompareBothWays,
) -> None:
    def inputs() -> list[Tensor]:
        x, residual = torch.randn(2, batch, *size, device=device, dtype=dtype).unbind()
        return [x.clone(), residual.clone(), *torch.randn(2, size[1], device=device).unbind()]

    x = inputs()[0]
    # Two tensors are read and two written; backward two gradients and the sum are read, and one
    # gradient, which both inputs have, is written.
    compare_both_ways(
        "add_layer_norm", inputs, {}, lambda _: (4 * x.nbytes, None), {"torch": _torch}
    )
