"""What a pose model gives, heatmaps or SimCC logits, on its way to keypoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernelpose.ops import decode_heatmap, decode_simcc, flip_merge

# (heatmaps (P, K, h, w),), or SimCC logits (P, K, columns' bins) and (P, K, rows' bins).
Outputs = tuple[Tensor, ...]


def run(model: Callable[[Tensor], Any], crops: Tensor) -> Outputs:
    """What a model makes of crops (P, 3, h, w).

    Raises TypeError if that is neither a tensor nor a pair of them.
    """
    found = model(crops)
    if isinstance(found, Tensor):
        return (found,)
    if isinstance(found, tuple) and [isinstance(each, Tensor) for each in found] == [True, True]:
        return found
    raise TypeError(
        f"model gives {type(found).__name__}; expected a tensor of heatmaps, or a pair of tensors "
        "of SimCC logits."
    )


def run_mirrored(model: Callable[[Tensor], Any], crops: Tensor) -> tuple[Outputs, Outputs]:
    """What a model makes of crops (P, 3, h, w), and of their mirror images.

    On a GPU in one pass, which fills it better. On a CPU in two: it is full with one image, and
    ViTPose-B is up to an eighth slower on 16 at once than on 8, as large activations are mapped
    anew.
    """
    mirrored = crops.flip(-1)
    if crops.is_cuda:
        both = [output.split(len(crops)) for output in run(model, torch.cat((crops, mirrored)))]
        return tuple(first for first, _ in both), tuple(second for _, second in both)
    return run(model, crops), run(model, mirrored)


def merge(outputs: Outputs, flipped: Outputs, flip_pairs: Sequence[tuple[int, int]]) -> Outputs:
    """The mean of outputs and those of the mirrored crops, see `kernelpose.ops.flip_merge`."""
    first = flip_merge(outputs[0], flipped[0], flip_pairs)
    if len(outputs) == 1:
        return (first,)
    # A mirror leaves rows alone: as maps of one column.
    rows, of_mirrored = outputs[1].unsqueeze(-1), flipped[1].unsqueeze(-1)
    return first, flip_merge(rows, of_mirrored, flip_pairs).squeeze(-1)


def decode(
    outputs: Outputs,
    centers: Tensor,
    scales: Tensor,
    *,
    image_size: tuple[int, int],
    mode: str = "mmpose1",
) -> tuple[Tensor, Tensor]:
    """Keypoints (P, K, 2) in image pixels, and scores (P, K).

    image_size: (height, width) of the crops. mode: of heatmaps, see `kernelpose.ops`.
    """
    if len(outputs) == 1:
        return decode_heatmap(outputs[0], centers, scales, mode=mode)
    x, y = outputs
    return decode_simcc(x, y, centers, scales, split_ratio=x.shape[2] / image_size[1])
