"""dilated_pyramid on the maps of HRPVT: its stem (HRPM v1) and the pyramids of its stages (v2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.both_ways import CompareBothWays
from benchmarks.setup import parameters


class Pyramid(NamedTuple):
    shape: tuple[int, int, int]  # of x
    widths: tuple[int, ...]
    stride: int
    mode: str
    tokens: bool = False  # channels_last

    @property
    def options(self) -> dict[str, Any]:
        dilations = ((1, 2, 5) * 2)[: len(self.widths)]
        return {"dilations": dilations, "stride": self.stride, "mode": self.mode}


def _v2(channels: int, height: int, width: int, tokens: bool = False) -> Pyramid:
    return Pyramid((channels, height, width), (channels,) * 3, 1, "sum", tokens)


CASES = {
    "v1 3x256x192 contiguous": (Pyramid((3, 256, 192), (16,) * 6, 2, "concat"), (1, 8)),
    "v1 3x256x192 tokens": (Pyramid((3, 256, 192), (16,) * 6, 2, "concat", True), (1, 8)),
    "v2 32x128x96 contiguous": (_v2(32, 128, 96), (1, 8)),
    "v2 32x128x96 tokens": (_v2(32, 128, 96, True), (1, 8)),
    "v2 64x64x48 contiguous": (_v2(64, 64, 48), (1, 8)),
    "v2 160x32x24 contiguous": (_v2(160, 32, 24), (1, 8)),
    "v2 256x16x12 contiguous": (_v2(256, 16, 12), (1, 8)),
}


@pytest.mark.parametrize(("case", "batch", "dtype"), parameters(CASES))
def bench_dilated_pyramid(
    case: Pyramid,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compare_both_ways: CompareBothWays,
) -> None:
    count = len(case.widths)
    inputs_of = (case.shape[0], *case.widths[:-1])
    pixels = batch * (case.shape[1] // case.stride) * (case.shape[2] // case.stride)

    def inputs() -> list[Tensor]:
        x = torch.randn(batch, *case.shape, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if case.tokens else x
        weights = [
            torch.randn(outputs, channels, 3, 3, device=device) / (225 * channels) ** 0.5
            for outputs, channels in zip(case.widths, inputs_of, strict=True)
        ]
        # Every other channel is active: the jump of ReLU's gradient is far from all values, or
        # rounding would decide it.
        biases = [4 - 8 * (torch.arange(o, device=device) % 2.0) for o in case.widths]
        return [x, *weights, *biases]

    def arrange(x: Tensor, *parameters: Tensor) -> tuple[Any, ...]:
        return x, parameters[:count], parameters[count:]

    def least(backward: bool) -> tuple[int, int]:
        """x is read and the result written, and backward the gradients of both as well; the
        backward pass computes the gradients of two factors of every product."""
        maps = (sum(case.widths) if case.mode == "concat" or backward else case.widths[0]) * pixels
        numbers = maps + batch * torch.Size(case.shape).numel()
        products = sum(9 * c * o for c, o in zip(inputs_of, case.widths, strict=True)) * pixels
        ways = 2 if backward else 1
        return ways * numbers * dtype.itemsize, 2 * ways * products

    compare_both_ways("dilated_pyramid", inputs, case.options, least, arrange=arrange)
