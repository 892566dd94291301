"""SimCC targets: one classification over bins per axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernelpose.codecs.coordinates import check_keypoints


def encode_simcc(
    keypoints: Tensor,
    visible: Tensor,
    *,
    input_size: tuple[int, int],
    split_ratio: float = 2.0,
    smoothing: str = "gaussian",
    sigma: float | tuple[float, float] = 6.0,
    normalize: bool = True,
    label_smooth_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bin targets of both axes (Li et al., "SimCC: a Simple Coordinate Classification
    Perspective for Human Pose Estimation", 2022).

    Args:
        keypoints: (B, K, 2) x, y in pixels of the model's input.
        visible: (B, K); joints below 0.5 get empty targets and keep their value as weight.
        input_size: (height, width).
        split_ratio: bins per pixel.
        smoothing: ``"gaussian"`` or ``"standard"``, one bin with ``1 - label_smooth_weight`` and
            the rest shared evenly among the others.
        sigma: of the Gaussian, in bins; a pair is (x, y).
        normalize: divide the Gaussian by ``sigma sqrt(2 pi)``; otherwise its peak is 1.

    Returns:
        Targets (B, K, width bins) and (B, K, height bins), and weights (B, K), 0 where the joint
        lies outside (``standard``) or its Gaussian does (``gaussian``).
    """
    check_keypoints(keypoints, visible)
    if smoothing not in ("gaussian", "standard"):
        raise ValueError(f"smoothing is {smoothing!r}; expected 'gaussian' or 'standard'.")
    gaussian = smoothing == "gaussian"
    sigmas = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    bins = [round(length * split_ratio) for length in reversed(input_size)]
    centers = torch.round(keypoints * split_ratio)
    limits = torch.tensor(bins, device=keypoints.device, dtype=keypoints.dtype)
    if gaussian:
        reach = 3 * torch.tensor(sigmas, device=keypoints.device, dtype=keypoints.dtype)
        reached = ((centers - reach < limits) & (centers + reach + 1 >= 0)).all(-1)
    else:
        reached = ((centers < limits) & (centers >= 0)).all(-1)
    labelled = visible >= 0.5
    weights = visible.to(keypoints.dtype) * (reached | ~labelled)
    drawn = (reached & labelled)[..., None]
    targets = []
    for axis, count in enumerate(bins):
        offset = torch.arange(count, device=keypoints.device) - centers[..., axis, None]
        if gaussian:
            target = torch.exp(-(offset**2) / (2 * sigmas[axis] ** 2))
            if normalize:
                target = target / (sigmas[axis] * math.sqrt(2 * math.pi))
        else:
            target = torch.where(
                offset == 0, 1.0 - label_smooth_weight, label_smooth_weight / (count - 1)
            ).to(keypoints.dtype)
        targets.append(torch.where(drawn, target, torch.zeros_like(target)))
    return targets[0], targets[1], weights
