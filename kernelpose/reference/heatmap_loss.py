"""Weighted squared error against Gaussian target heatmaps, in plain PyTorch: what the op computes.

The targets by themselves are `kernelpose.codecs.encode_udp` and `encode_msra`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TARGET_CODECS = ("udp", "msra", "unbiased")


def heatmap_loss(
    pred: Tensor,
    keypoints: Tensor,
    visible: Tensor,
    input_size: tuple[int, int],
    sigma: float = 2.0,
    codec: str = "udp",
) -> Tensor:
    """Mean of weight * (pred - target)^2; see `kernelpose.ops.heatmap_loss`."""
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    keypoints, visible = keypoints.detach().to(dtype), visible.detach().to(dtype)
    targets, weights = gaussian_targets(
        keypoints, visible, input_size, (pred.shape[2], pred.shape[3]), sigma, codec
    )
    weights = weights[..., None, None]
    # Filled, not only multiplied: what does not count may be anything.
    difference = (pred.to(dtype) - targets).masked_fill(weights == 0, 0)
    return (weights * difference.square()).mean()


def gaussian_targets(
    keypoints: Tensor,
    visible: Tensor,
    input_size: tuple[int, int],
    heatmap_size: tuple[int, int],
    sigma: float,
    codec: str,
) -> tuple[Tensor, Tensor]:
    """Heatmaps (B, K, h, w) and weights (B, K) in the dtype of keypoints (B, K, 2).

    codec: "udp", "msra", or "unbiased" for MSRA with the fractional centre and the whole map.
    """
    ratio = torch.tensor(
        pixel_ratio(input_size, heatmap_size, udp=codec == "udp"),
        device=keypoints.device,
        dtype=keypoints.dtype,
    )
    centers = keypoints / ratio
    radius = 3 * sigma
    if codec == "unbiased":
        first, last = centers - radius, centers + radius + 1
        profiles = [
            torch.exp(-((_pixels(size, centers) - centers[..., axis, None]) ** 2) / (2 * sigma**2))
            for axis, size in enumerate(reversed(heatmap_size))
        ]
    else:
        # A window of 2r + 1 pixels around the nearest one; r may be fractional.
        nearest = torch.trunc(centers + 0.5)
        first, last = torch.trunc(nearest - radius), torch.trunc(nearest + radius + 1)
        shift = centers - nearest if codec == "udp" else torch.zeros_like(centers)
        profiles = []
        for axis, size in enumerate(reversed(heatmap_size)):
            start, end = first[..., axis, None], last[..., axis, None]
            pixels = _pixels(size, centers)
            offset = pixels - start - math.floor((2 * radius + 1) / 2) - shift[..., axis, None]
            inside = (pixels >= start) & (pixels < end)
            profiles.append(torch.exp(-(offset**2) / (2 * sigma**2)) * inside)
    limits = torch.tensor(heatmap_size[::-1], device=centers.device, dtype=centers.dtype)
    reached = ((first < limits) & (last >= 0)).all(-1)
    labelled = visible >= 0.5
    weights = visible.to(centers.dtype) * (reached | ~labelled)
    x, y = profiles
    maps = y[..., :, None] * x[..., None, :]
    # where, not a product: a keypoint that is not drawn may be NaN.
    drawn = (reached & labelled)[..., None, None]
    return torch.where(drawn, maps, torch.zeros_like(maps)), weights


def pixel_ratio(
    input_size: tuple[int, int], heatmap_size: tuple[int, int], *, udp: bool
) -> tuple[float, float]:
    """Input pixels to a heatmap pixel, in x and y; sizes are (height, width).

    Under UDP lengths run from the centre of the first pixel to that of the last.
    """
    end = 1 if udp else 0
    height, width = ((i - end) / (h - end) for i, h in zip(input_size, heatmap_size, strict=True))
    return width, height


def _pixels(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device, dtype=like.dtype)
