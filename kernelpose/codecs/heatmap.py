"""Gaussian target heatmaps: MSRA (rounded and unbiased) and UDP."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernelpose.codecs.coordinates import check_keypoints, input_to_heatmap


def encode_msra(
    keypoints: Tensor,
    visible: Tensor,
    *,
    input_size: tuple[int, int],
    heatmap_size: tuple[int, int],
    sigma: float = 2.0,
    unbiased: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gaussian heatmaps in the convention where pixels are cells (``input / heatmap`` scaling).

    The plain form centres a window of radius 3 sigma on the nearest heatmap pixel (Xiao et al.,
    "Simple Baselines for Human Pose Estimation and Tracking", 2018). ``unbiased`` keeps the
    fractional centre and the whole map (Zhang et al., "Distribution-Aware Coordinate
    Representation", 2020).

    Args:
        keypoints: (B, K, 2) x, y in pixels of the model's input.
        visible: (B, K); joints below 0.5 get an empty map and keep their value as weight.
        input_size, heatmap_size: (height, width).
        sigma: standard deviation in heatmap pixels.

    Returns:
        Heatmaps (B, K, h, w) with peak 1, and weights (B, K): ``visible``, but 0 where the
        Gaussian lies outside the map. Both in the dtype of ``keypoints``.
    """
    check_keypoints(keypoints, visible)
    centers = input_to_heatmap(keypoints, input_size, heatmap_size, udp=False)
    if not unbiased:
        return _windowed(centers, visible, heatmap_size, sigma, subpixel=False)
    drawn, weights = _in_reach(centers, visible, heatmap_size, 3 * sigma)
    profiles = [
        torch.exp(-((_pixels(size, centers) - centers[..., axis, None]) ** 2) / (2 * sigma**2))
        for axis, size in enumerate(reversed(heatmap_size))
    ]
    return _outer(profiles, drawn), weights


def encode_udp(
    keypoints: Tensor,
    visible: Tensor,
    *,
    input_size: tuple[int, int],
    heatmap_size: tuple[int, int],
    sigma: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Gaussian heatmaps in the UDP convention, where lengths run from pixel centre to pixel centre.

    Huang et al., "The Devil is in the Details: Delving into Unbiased Data Processing for Human
    Pose Estimation", 2020: scaling is ``(input - 1) / (heatmap - 1)``, the centre is fractional,
    the window has radius 3 sigma around the nearest pixel. Arguments and results as
    `encode_msra`.
    """
    check_keypoints(keypoints, visible)
    centers = input_to_heatmap(keypoints, input_size, heatmap_size, udp=True)
    return _windowed(centers, visible, heatmap_size, sigma, subpixel=True)


def _windowed(
    centers: Tensor, visible: Tensor, size: tuple[int, int], sigma: float, *, subpixel: bool
) -> tuple[Tensor, Tensor]:
    nearest = torch.trunc(centers + 0.5)
    radius = 3 * sigma
    drawn, weights = _in_reach(nearest, visible, size, radius, whole=True)
    peaks = centers if subpixel else nearest
    profiles = []
    for axis, length in enumerate(reversed(size)):
        pixels = _pixels(length, centers)
        middle = nearest[..., axis, None]
        # A window of 2r + 1 pixels starting at trunc(middle - r); r may be fractional.
        first = torch.trunc(middle - radius)
        inside = (pixels >= first) & (pixels < torch.trunc(middle + radius + 1))
        offset = pixels - first - math.floor((2 * radius + 1) / 2)
        offset = offset - (peaks[..., axis, None] - middle)
        profiles.append(torch.exp(-(offset**2) / (2 * sigma**2)) * inside)
    return _outer(profiles, drawn), weights


def _in_reach(
    centers: Tensor, visible: Tensor, size: tuple[int, int], radius: float, *, whole: bool = False
) -> tuple[Tensor, Tensor]:
    """Which joints are drawn, and the target weights that follow."""
    first, last = centers - radius, centers + radius + 1
    if whole:
        first, last = torch.trunc(first), torch.trunc(last)
    limits = torch.tensor(size[::-1], device=centers.device, dtype=centers.dtype)
    reached = ((first < limits) & (last >= 0)).all(-1)
    labelled = visible >= 0.5
    weights = visible.to(centers.dtype) * (reached | ~labelled)
    return reached & labelled, weights


def _pixels(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device, dtype=like.dtype)


def _outer(profiles: list[Tensor], drawn: Tensor) -> Tensor:
    x, y = profiles
    maps = y[..., :, None] * x[..., None, :]
    # where, not a product: a keypoint that is not drawn may be NaN.
    return torch.where(drawn[..., None, None], maps, torch.zeros_like(maps))
