"""decode_heatmap on ViTPose's heatmaps, joints anywhere in the picture."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks.forward import Compare
from benchmarks.setup import parameters
from kernelpose.codecs import encode_udp
from kernelpose.pipeline import plain

JOINTS = 17
SURE = (0.2, 1.0)  # the heights of the peaks
FAINT = (1.5e-3, 2e-3)  # each map has to be blurred as a whole, as its logarithm may be clipped
# (mode, height and width of the maps, heights)
CASES = {
    "decode mmpose1 64x48": (("mmpose1", (64, 48), SURE), (1, 64)),
    "decode mmpose1 64x48 faint": (("mmpose1", (64, 48), FAINT), (64,)),
    "decode mmpose1 96x72": (("mmpose1", (96, 72), SURE), (64,)),
    "decode transformers 64x48": (("transformers", (64, 48), SURE), (64,)),
    "decode shift 64x48": (("shift", (64, 48), SURE), (64,)),
}


def _heatmaps(batch: int, size: tuple[int, int], heights: tuple[float, float]) -> Tensor:
    """Targets of these heights under a hundredth of noise."""
    height, width = size
    keypoints = torch.rand(batch, JOINTS, 2) * torch.tensor([4.0 * width - 1, 4.0 * height - 1])
    heatmaps, _ = encode_udp(
        keypoints,
        torch.ones(batch, JOINTS),
        input_size=(4 * height, 4 * width),
        heatmap_size=size,
    )
    low, high = heights
    peaks = low + (high - low) * torch.rand(batch, JOINTS, 1, 1)
    return peaks * heatmaps + 0.01 * low * torch.rand(heatmaps.shape)


def _plain(heatmaps: Tensor, centers: Tensor, scales: Tensor, *, mode: str) -> tuple[Tensor, ...]:
    locations, scores = getattr(plain, f"decode_{mode}")(heatmaps.numpy())
    size = (heatmaps.shape[2], heatmaps.shape[3])
    keypoints = plain.to_image(locations, centers.numpy(), scales.numpy(), size)
    return torch.from_numpy(keypoints).float(), torch.from_numpy(scores)


def _same(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(result[0], expected[0], rtol=0, atol=5e-3)  # pixels of the image
    torch.testing.assert_close(result[1], expected[1], rtol=0, atol=0)


@pytest.mark.parametrize(("case", "batch", "dtype"), parameters(CASES))
def bench_decode_heatmap(
    case: tuple[str, tuple[int, int], tuple[float, float]],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compare: Compare,
) -> None:
    mode, size, heights = case

    def inputs() -> list[Tensor]:
        heatmaps = _heatmaps(batch, size, heights).to(device=device, dtype=dtype)
        centers = 500 * torch.rand(batch, 2, device=device)
        return [heatmaps, centers, 100 + centers]

    compare(
        "decode_heatmap",
        inputs,
        {"mode": mode},
        functools.partial(_plain, mode=mode),
        bytes=inputs()[0].nbytes,
        same=_same,
    )
