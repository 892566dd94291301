"""MiTPOSE's checkpoints: ours of layout "figure" and "released", and mmpose's of the latter.

The released backbone has its own names in ours too, which are those of mmpretrain's transformer
with more beside them; mmpose calls the decoder `head`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from kernelpose.checkpoints import vitpose
from kernelpose.checkpoints.files import StateDict
from kernelpose.checkpoints.layouts import POSITIONS, Imported, Layout
from kernelpose.checkpoints.naming import MMPOSE1_NAMES, Renaming
from kernelpose.checkpoints.plus import HEAD
from kernelpose.checkpoints.shapes import decoder_of
from kernelpose.models.vit import PATCH_SIZE

_MMPRETRAIN = Renaming(MMPOSE1_NAMES)


class Figure(Layout):
    """Layout "figure", in our names."""

    mark = "backbone.blocks.0.local.conv_7x7.weight"


class Released(Layout):
    """Layout "released", in our names."""

    mark = "backbone.module.conv_7x7.weight"

    def recognises(self, names: Collection[str]) -> bool:
        return self.mark in names and not any(name.startswith("head.") for name in names)


class ReleasedMMPose1(Layout):
    """mmpose 1.x around the released backbone."""

    name = "mmpose1"
    mark = Released.mark
    wraps = True

    def assemble(self, imported: Imported, dataset: str | None) -> None:
        imported.tensors = _with_prefix(imported.tensors, "head.", HEAD)

    def disassemble(self, tensors: StateDict) -> StateDict:
        return _with_prefix(tensors, HEAD, "head.")


def _with_prefix(tensors: StateDict, old: str, new: str) -> StateDict:
    return {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor
        for name, tensor in tensors.items()
    }


def config_of_figure(tensors: StateDict, **given: Any) -> dict[str, Any]:
    """Arguments of MiTPOSE; `given` as `kernelpose.checkpoints.vitpose.config_of` takes it."""
    config = vitpose.config_of(tensors, **{**given, "patch_stride": PATCH_SIZE})
    config = {k: v for k, v in config.items() if k != "patch_stride"}
    return {**config, "layout": "figure", "decoder": decoder_of(tensors)["decoder"] or "simple"}


def config_of_released(tensors: StateDict, **given: Any) -> dict[str, Any]:
    """The same for layout "released"."""
    return {**config_of_figure(_as_vitpose(tensors), **given), "layout": "released"}


def flat_grid_of_released(tensors: StateDict) -> tuple[int, int] | None:
    """As `kernelpose.checkpoints.vitpose.flat_grid`, for layout "released"."""
    return vitpose.flat_grid(_as_vitpose(tensors))


def _as_vitpose(tensors: StateDict) -> StateDict:
    """Under the names of ViTPose, where it has them; with a row for the class slot."""
    renamed = {_MMPRETRAIN.ours(name) or name: tensor for name, tensor in tensors.items()}
    table = renamed.get(POSITIONS)
    if table is not None and table.dim() == 3:
        renamed[POSITIONS] = torch.cat((table[:, :1], table), 1)
    return renamed
