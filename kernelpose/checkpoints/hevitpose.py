"""HEViTPose's checkpoints: ours, as the authors released none."""

from __future__ import annotations

import re
from typing import Any

from kernelpose.checkpoints.files import StateDict
from kernelpose.checkpoints.layouts import Layout
from kernelpose.checkpoints.shapes import decoder_of, numbered, recorded_size, sizes_of
from kernelpose.errors import UserError
from kernelpose.models.hevitpose import NUM_HEADS, SIZES, STRIDES

_GROUPS = "backbone.stages.{}.blocks.0.attn.groups."


class Ours(Layout):
    """Our names."""

    mark = f"{_GROUPS.format(0)}0.q.weight"


def config_of(tensors: StateDict, *, num_heads: int | None = None, **_: Any) -> dict[str, Any]:
    """Arguments of HEViTPose; num_heads, which no shape tells, is given or that of the zoo."""
    dims, depths, reductions = [], [], []
    for stage in range(len(STRIDES)):
        prefix = f"backbone.stages.{stage}."
        dims.append(sizes_of(tensors, f"{prefix}embed.conv.weight", 4, (0,))[0])
        blocks = re.compile(re.escape(prefix) + r"blocks\.(\d+)\.")
        depths.append(numbered(tensors, blocks, "blocks"))
        reduction = f"{_GROUPS.format(stage)}0.sr.weight"
        reductions.append(sizes_of(tensors, reduction, 4, (2,))[0])
    sizes = {"embed_dims": tuple(dims), "depths": tuple(depths)}
    if num_heads is None:
        if sizes not in SIZES.values():
            raise UserError(
                f"num_heads is None; expected a number for embed_dims {sizes['embed_dims']} and "
                f"depths {sizes['depths']}."
            )
        num_heads = NUM_HEADS
    groups = re.compile(re.escape(_GROUPS.format(0)) + r"(\d+)\.")
    hidden = "backbone.stages.0.blocks.0.ffn1.fc1.conv.weight"
    decoder = decoder_of(tensors)
    return {
        **sizes,
        "num_groups": numbered(tensors, groups, "groups"),
        "num_heads": num_heads,
        "sr_ratios": tuple(reductions),
        "ffn_ratio": sizes_of(tensors, hidden, 4, (0,))[0] / dims[0],
        **decoder,
        "decoder": decoder["decoder"] or "classic",
        "image_size": recorded_size(tensors, 1) or (256, 192),
    }
