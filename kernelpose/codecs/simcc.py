"""SimCC: targets of one classification over bins per axis, and their loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
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


def simcc_loss(x: Tensor, y: Tensor, target_x: Tensor, target_y: Tensor, weights: Tensor) -> Tensor:
    """Kullback-Leibler divergence of targets from the softmax of logits, as mmpose's KLDiscretLoss.

    Its mean over the bins of each axis, times the joint's weight, summed over axes, joints and
    persons and divided by the number of joints (not of persons, as mmpose).

    Args:
        x, y: (B, K, bins of the width) and (B, K, bins of the height) logits.
        target_x, target_y: as `encode_simcc` gives them, of the same shapes.
        weights: (B, K).

    Returns a scalar, computed in float32 at least. Raises ValueError for another shape.
    """
    total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
    for name, logits, target in (("x", x, target_x), ("y", y, target_y)):
        if logits.dim() != 3 or logits.shape[:2] != weights.shape or logits.shape[1] == 0:
            raise ValueError(
                f"{name} has shape {tuple(logits.shape)}; expected {(*weights.shape, 'bins')}, "
                "(B, K) of weights."
            )
        if target.shape != logits.shape:
            raise ValueError(
                f"target_{name} has shape {tuple(target.shape)}; expected {tuple(logits.shape)}, "
                f"as {name}."
            )
        log_probabilities = logits.to(total.dtype).log_softmax(-1)
        divergence = F.kl_div(log_probabilities, target.to(total.dtype), reduction="none").mean(-1)
        total = total + (divergence * weights).sum()
    return total / x.shape[1]
