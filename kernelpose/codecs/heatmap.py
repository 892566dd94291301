"""Gaussian target heatmaps: MSRA (rounded and unbiased) and UDP."""

from __future__ import annotations

from torch import Tensor

from kernelpose.codecs.coordinates import check_keypoints
from kernelpose.reference.heatmap_loss import gaussian_targets


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
    codec = "unbiased" if unbiased else "msra"
    return gaussian_targets(keypoints, visible, input_size, heatmap_size, sigma, codec)


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
    return gaussian_targets(keypoints, visible, input_size, heatmap_size, sigma, "udp")
