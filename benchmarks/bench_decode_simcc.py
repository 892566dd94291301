"""decode_simcc on the bins of 256 x 192 and 384 x 288 inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.forward import Compare
from benchmarks.setup import parameters
from kernelpose.pipeline import plain

# (joints, bins of the width, bins of the height)
CASES = {
    "simcc 256x192": ((17, 384, 512), (1, 64)),
    "simcc 384x288": ((17, 576, 768), (64,)),
    "simcc 256x192 wholebody": ((133, 384, 512), (64,)),
}


def _plain(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    points, scores = plain.decode_simcc(x.numpy(), y.numpy())
    return torch.from_numpy(points), torch.from_numpy(scores)


@pytest.mark.parametrize(("case", "batch", "dtype"), parameters(CASES))
def bench_decode_simcc(
    case: tuple[int, int, int],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compare: Compare,
) -> None:
    joints, *bins = case

    def inputs() -> list[Tensor]:
        return [torch.randn(batch, joints, n, device=device, dtype=dtype) for n in bins]

    compare("decode_simcc", inputs, {}, _plain, bytes=sum(t.nbytes for t in inputs()))
