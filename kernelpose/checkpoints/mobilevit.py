"""MobileViTPose's checkpoints: whole models, and backbones of the released code and of timm."""

from __future__ import annotations

import re
from typing import Any

from kernelpose.checkpoints.files import StateDict
from kernelpose.checkpoints.layouts import Imported, Layout
from kernelpose.checkpoints.pyramid import BACKBONE
from kernelpose.checkpoints.shapes import decoder_of, numbered, recorded_size, sizes_of

_CLASSIFIERS = ("fc.", "head.fc.")  # of the released code and of timm; no pose model has them


class MobileViT(Layout):
    """Ours, whose backbone has its variant's own names, alone or with "backbone." before them."""

    def __init__(self, variant: str, prefix: str) -> None:
        self.prefix = prefix
        self.mark = prefix + _MARKS[variant]

    def assemble(self, imported: Imported, dataset: str | None) -> None:
        given = imported.tensors
        classifiers = tuple(self.prefix + name for name in _CLASSIFIERS)
        imported.left_over += [name for name in given if name.startswith(classifiers)]
        add = "" if self.prefix else BACKBONE
        imported.tensors = {add + k: v for k, v in given.items() if not k.startswith(classifiers)}


def config_of(tensors: StateDict, **_: Any) -> dict[str, Any]:
    """Arguments of MobileViTPose for tensors in our names."""
    variant = next(v for v, mark in _MARKS.items() if BACKBONE + mark in tensors)
    names = _RELEASED if variant == "released" else _APPLE

    def width(name: str, axis: int = 0) -> int:
        return sizes_of(tensors, f"{BACKBONE}{name}.weight", 4, (axis,))[0]

    widths = tuple(map(width, names["features"]))
    blocks = [f"{names['stage'].format(number)}.1." for number in (2, 3, 4)]
    decoder = decoder_of(tensors)
    return {
        "features_list": widths,
        "d_list": tuple(width(block + names["to_map"], 1) for block in blocks),
        "transformer_depth": tuple(
            numbered(
                tensors,
                re.compile(re.escape(f"{BACKBONE}{block}{names['layers']}.") + r"(\d+)\."),
                "layers",
            )
            for block in blocks
        ),
        "expansion": width(names["expanded"]) // widths[0],
        "variant": variant,
        **decoder,
        "decoder": decoder["decoder"] or "classic",
        "image_size": recorded_size(tensors, 1) or (256, 192),
    }


# Names by variant: of the convolutions that make the maps of features_list; of a stage; inside a
# MobileViT block, of the convolution from tokens to a map and of the transformer's layers; of the
# first convolution of the first inverted residual.
_RELEASED: dict[str, Any] = {
    "features": (
        "stem.0",
        "stem.1.conv.2",
        "stage1.0.conv.2",
        "stage1.2.conv.2",
        *(f"stage{n}.{name}" for n in (2, 3, 4) for name in ("0.conv.2", "1.fusion_block2")),
        "stage4.2",
    ),
    "stage": "stage{}",
    "to_map": "fusion_block1",
    "layers": "transformer.layers",
    "expanded": "stem.1.conv.0.conv",
}
_APPLE: dict[str, Any] = {
    "features": (
        "stem.conv",
        "stages.0.0.conv3_1x1.conv",
        "stages.1.0.conv3_1x1.conv",
        "stages.1.2.conv3_1x1.conv",
        *(
            f"stages.{n}.{name}.conv"
            for n in (2, 3, 4)
            for name in ("0.conv3_1x1", "1.conv_fusion")
        ),
        "final_conv.conv",
    ),
    "stage": "stages.{}",
    "to_map": "conv_proj.conv",
    "layers": "transformer",
    "expanded": "stages.0.0.conv1_1x1.conv",
}
_MARKS = {
    "released": "stage2.1.fusion_block1.weight",
    "apple": "stages.2.1.conv_proj.conv.weight",
}
