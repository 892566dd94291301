"""The mean of heatmaps and those of the mirrored input, in plain PyTorch: what the op computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flip_merge(heatmaps: Tensor, flipped: Tensor, order: Sequence[int], shift: bool) -> Tensor:
    """Mean of maps and mirrored maps; see `kernelpose.ops.flip_merge`.

    heatmaps, flipped (P, K, ..., w) -> (P, K, ..., w); joint k of the input is joint ``order[k]``
    of the mirrored input.
    """
    back = flipped[:, list(order)].flip(-1)
    if shift:
        back = torch.cat((back[..., :1], back[..., :-1]), -1)
    wide = torch.promote_types(heatmaps.dtype, torch.float32)
    return ((heatmaps.to(wide) + back.to(wide)) / 2).to(heatmaps.dtype)
