"""flip_merge on heatmaps and on SimCC logits."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks.forward import Compare
from benchmarks.setup import parameters
from kernelpose.data.skeletons import COCO
from kernelpose.pipeline import plain

# (joints and map, shift)
CASES = {
    "flip heatmaps 64x48": (((17, 64, 48), False), (1, 64)),
    "flip heatmaps 64x48 shift": (((17, 64, 48), True), (64,)),
    "flip heatmaps 96x72": (((17, 96, 72), False), (64,)),
    "flip simcc logits 384": (((17, 384), False), (64,)),
}
PAIRS = COCO.flip_pairs


def _plain(heatmaps: Tensor, flipped: Tensor, *, shift: bool) -> Tensor:
    return torch.from_numpy(plain.flip_merge(heatmaps.numpy(), flipped.numpy(), PAIRS, shift=shift))


@pytest.mark.parametrize(("case", "batch", "dtype"), parameters(CASES))
def bench_flip_merge(
    case: tuple[tuple[int, ...], bool],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compare: Compare,
) -> None:
    shape, shift = case

    def inputs() -> list[Tensor]:
        return [torch.randn(batch, *shape, device=device, dtype=dtype) for _ in range(2)]

    compare(
        "flip_merge",
        inputs,
        {"flip_pairs": PAIRS, "shift": shift},
        functools.partial(_plain, shift=shift),
        bytes=3 * inputs()[0].nbytes,
    )
