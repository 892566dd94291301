"""SimCC logits to keypoints, in plain PyTorch: what the op computes."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_simcc(
    x: Tensor,
    y: Tensor,
    centers: Tensor | None,
    scales: Tensor | None,
    split_ratio: float,
    udp: bool,
) -> tuple[Tensor, Tensor]:
    """Keypoints (P, K, 2) and scores (P, K), float32; see `kernelpose.ops.decode_simcc`."""
    best_x, index_x = x.float().max(-1)
    best_y, index_y = y.float().max(-1)
    scores = torch.minimum(best_x, best_y)
    bins = torch.stack((index_x, index_y), -1).float()
    points = torch.where((scores > 0)[..., None], bins, -1.0) / split_ratio
    if centers is not None and scales is not None:
        size = torch.tensor([x.shape[-1], y.shape[-1]], device=x.device) / split_ratio
        centers, scales = centers.float(), scales.float()
        unit = scales / (size - 1 if udp else size)
        points = points * unit[:, None] + (centers - scales / 2)[:, None]
    return points, torch.where(scores.isnan(), 0.0, scores)
