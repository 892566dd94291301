"""The model that a checkpoint describes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from kernelpose.checkpoints.families import detect
from kernelpose.checkpoints.files import read_state_dict
from kernelpose.checkpoints.layouts import TRANSFORMERS_EPS, Transformers
from kernelpose.models.vitpose import ViTPose


def infer_config(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    num_heads: int | None = None,
    grid: tuple[int, int] | None = None,
    patch_stride: int | None = None,
    dataset: str | None = None,
) -> dict[str, Any]:
    """Arguments of `infer_class`'s class for a checkpoint of any layout.

        model = ViTPose(**infer_config(path))
        load_checkpoint(model, path)

    Args:
        checkpoint: a file, or what it holds.
        num_heads: of ViTPose, MiTPOSE and HEViTPose, must be given for widths other than those of
            the zoo; no shape tells it.
        grid: (rows, columns) of the position table, where the checkpoint does not record it and it
            is neither 4:3 portrait nor square.
        patch_stride: of ViTPose, 16 or 8; where the checkpoint does not record it, the decoder
            tells it, but for a simple one, where 16 is assumed.
        dataset: whose expert and decoder to take from a ViTPose+ checkpoint ("coco" by default).

    Raises UserError for a checkpoint that cannot be read, and for what it does not tell.
    """
    state_dict = read_state_dict(checkpoint)
    family, layout = detect(state_dict)
    tensors = layout.import_(state_dict, dataset).tensors
    config = family.config(tensors, num_heads=num_heads, grid=grid, patch_stride=patch_stride)
    if family.model is ViTPose:
        eps = TRANSFORMERS_EPS if isinstance(layout, Transformers) else 1e-6
        config["layer_norm_eps"] = eps
    return config


def infer_class(checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> type[nn.Module]:
    """The class of the model; for a backbone alone `PVTv2`, or the class of the whole model.

    Raises UserError for a checkpoint that cannot be read, or is of none of them.
    """
    return detect(read_state_dict(checkpoint))[0].model
