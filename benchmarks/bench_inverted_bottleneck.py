"""inverted_bottleneck at the sizes of MobileViT-S; plain is the same on maps in NCHW memory."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.forward import Compare
from benchmarks.setup import parameters
from kernelpose.reference.inverted_bottleneck import ACTIVATIONS

# (channels, hidden, outputs), map, stride
CASES = {
    "inverted 64x48 c64": (((64, 256, 64), (64, 48), 1), (1, 8)),
    "inverted 128x96 c32 stride 2": (((32, 128, 64), (128, 96), 2), (1, 8)),
    "inverted 32x24 c96 stride 2": (((96, 384, 128), (32, 24), 2), (1, 8)),
}


def _plain(
    x: Tensor, *weights: Tensor, stride: int, residual: bool, activations: tuple[str, str]
) -> Tensor:
    expand, expand_bias, depthwise, depthwise_bias, project, project_bias = weights
    first, second = (ACTIVATIONS[name] for name in activations)
    conv = torch.nn.functional.conv2d
    y = first(conv(x.contiguous(), expand, expand_bias))
    y = second(conv(y, depthwise, depthwise_bias, stride, 1, groups=len(depthwise)))
    y = conv(y, project, project_bias)
    return x + y if residual else y


@pytest.mark.parametrize(("case", "batch", "dtype"), parameters(CASES))
def bench_inverted_bottleneck(
    case: tuple[tuple[int, int, int], tuple[int, int], int],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compare: Compare,
) -> None:
    (channels, hidden, outputs), size, stride = case
    shapes = [(hidden, channels, 1, 1), (hidden,), (hidden, 1, 3, 3), (hidden,)]
    shapes += [(outputs, hidden, 1, 1), (outputs,)]

    def inputs() -> list[Tensor]:
        x = torch.randn(batch, *size, channels, device=device, dtype=dtype).permute(0, 3, 1, 2)
        weights = [torch.randn(s, device=device, dtype=dtype) for s in shapes]
        return [x, *(w / w[0].numel() ** 0.5 for w in weights)]

    options: dict[str, Any] = {
        "stride": stride,
        "residual": stride == 1,
        "activations": ("none", "silu"),
    }
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    read, written = inputs()[0].nbytes, outputs * inputs()[0].nbytes // channels // stride**2
    compare(
        "inverted_bottleneck",
        inputs,
        options,
        functools.partial(_plain, **options),
        bytes=read + written,
        same=functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance),
    )
