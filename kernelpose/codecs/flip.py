"""Flip test: the heatmaps of the mirrored input, brought back and averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flip_back(
    flipped: Tensor, flip_pairs: Sequence[tuple[int, int]], *, shift: bool = False
) -> Tensor:
    """Undo a horizontal flip of the input: mirror the maps and swap left and right joints.

    Args:
        flipped: (B, K, h, w), heatmaps of the mirrored input.
        flip_pairs: indices of left and right joints.
        shift: move the maps right by one pixel, for models whose inputs are not aligned at pixel
            centres; not under UDP.
    """
    joints = flipped.shape[1]
    order = list(range(joints))
    for left, right in flip_pairs:
        if not (0 <= left < joints and 0 <= right < joints):
            raise ValueError(f"flip_pairs holds ({left}, {right}); expected joints below {joints}.")
        order[left], order[right] = right, left
    maps = flipped.flip(-1)[:, order]
    if shift:
        maps = torch.cat((maps[..., :1], maps[..., :-1]), -1)
    return maps


def flip_merge(
    heatmaps: Tensor,
    flipped: Tensor,
    flip_pairs: Sequence[tuple[int, int]],
    *,
    shift: bool = False,
) -> Tensor:
    """Mean of the heatmaps of an input and those of its mirror image (`flip_back`)."""
    if heatmaps.shape != flipped.shape:
        raise ValueError(
            f"flipped has shape {tuple(flipped.shape)}; expected {tuple(heatmaps.shape)}, "
            "as heatmaps."
        )
    return (heatmaps + flip_back(flipped, flip_pairs, shift=shift)) / 2
