"""Where heatmap pixels lie in the model's input and in the image, under both conventions."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelpose.reference.heatmap_loss import pixel_ratio


def input_to_heatmap(
    points: Tensor, input_size: tuple[int, int], heatmap_size: tuple[int, int], *, udp: bool
) -> Tensor:
    """Input pixels (..., 2) to heatmap pixels; sizes are (height, width)."""
    return points / _ratio(points, input_size, heatmap_size, udp)


def heatmap_to_input(
    points: Tensor, input_size: tuple[int, int], heatmap_size: tuple[int, int], *, udp: bool
) -> Tensor:
    """Heatmap pixels (..., 2) to input pixels; sizes are (height, width).

    The inverse of `input_to_heatmap`. mmpose 1.x writes ``x / (w - 1) * input_width`` under UDP,
    a unit between the two that its own mapping to the image divides out again.
    """
    return points * _ratio(points, input_size, heatmap_size, udp)


def check_keypoints(keypoints: Tensor, visible: Tensor) -> None:
    """Raise ValueError unless keypoints is a float (B, K, 2) and visible (B, K)."""
    if keypoints.dim() != 3 or keypoints.shape[-1] != 2 or not keypoints.is_floating_point():
        raise ValueError(
            f"keypoints is {keypoints.dtype} {tuple(keypoints.shape)}; expected a floating-point "
            "(B, K, 2) tensor."
        )
    if visible.shape != keypoints.shape[:2]:
        raise ValueError(
            f"visible has shape {tuple(visible.shape)}; expected {tuple(keypoints.shape[:2])}, "
            "(B, K) of keypoints."
        )


def _ratio(
    like: Tensor, input_size: tuple[int, int], heatmap_size: tuple[int, int], udp: bool
) -> Tensor:
    ratio = pixel_ratio(input_size, heatmap_size, udp=udp)
    return torch.tensor(ratio, device=like.device, dtype=like.dtype)
