"""The four layouts of ViTPose: how each is recognised, brought into ours, and written from ours.

Ours is the official one with what no shape tells (backbone.pos_grid, the grid of the position
table; for other than the released form backbone.windows and backbone.patch_stride), any number of
decoders by name (keypoint_heads.<data set>), and without experts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from kernelpose.checkpoints.files import StateDict
from kernelpose.checkpoints.naming import (
    MMPOSE1_NAMES,
    OFFICIAL_NAMES,
    TRANSFORMERS_NAMES,
    Renaming,
)
from kernelpose.checkpoints.plus import join_decoders, merge_experts, split_decoders
from kernelpose.errors import UserError

POSITIONS = "backbone.pos_embed"
GRID = "backbone.pos_grid"
WINDOWS = "backbone.windows"
STRIDE = "backbone.patch_stride"
INPUT_SIZE = "input_size"  # of models without a position table
FORM = (GRID, WINDOWS, STRIDE, INPUT_SIZE)  # what our layout alone records
TRANSFORMERS_EPS = 1e-12  # of its layer norms; 1e-6 everywhere else


@dataclass
class Imported:
    """A checkpoint in our names.

    Attributes:
        layout: where it came from.
        tensors: in our names, with experts merged; backbone.pos_grid only if it was recorded.
        left_over: names, as the file has them, that our layout has no place for.
        notes: what was changed on the way.
    """

    layout: str
    tensors: StateDict
    left_over: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Layout:
    """One layout. The base class is our own: names and tensors stay as they are."""

    name = "kernelpose"
    mark = GRID  # a tensor that this layout alone has
    wraps = False  # whether its own tools expect the tensors under "state_dict"
    renaming: Renaming | None = None

    def recognises(self, names: Collection[str]) -> bool:
        """Whether a state_dict with these names is of this layout."""
        return self.mark in names

    def import_(self, state_dict: StateDict, dataset: str | None) -> Imported:
        """Brings a state_dict of this layout into ours."""
        imported = Imported(self.name, {})
        for name, tensor in state_dict.items():
            ours = self.renaming.ours(name) if self.renaming else name
            if ours is None:
                imported.left_over.append(name)
            else:
                imported.tensors[ours] = tensor
        self.assemble(imported, dataset)
        return imported

    def export(self, tensors: StateDict) -> tuple[StateDict, list[str]]:
        """A state_dict in this layout, and the names of ours that it has no place for."""
        tensors = self.disassemble(dict(tensors))
        if self.renaming is None:
            return tensors, []
        named = {name: self.renaming.theirs(name) for name in tensors if name not in FORM}
        state_dict = {theirs: tensors[ours] for ours, theirs in named.items() if theirs}
        return state_dict, [ours for ours, theirs in named.items() if theirs is None]

    def assemble(self, imported: Imported, dataset: str | None) -> None:
        """What renaming alone does not do, on the way in."""

    def disassemble(self, tensors: StateDict) -> StateDict:
        """What renaming alone does not do, on the way out."""
        return tensors


class Official(Layout):
    """ViTAE-Transformer/ViTPose and easy_ViTPose, ViTPose+ included."""

    name = "official"
    mark = "backbone.patch_embed.proj.weight"
    wraps = True
    renaming = Renaming(OFFICIAL_NAMES)

    def assemble(self, imported: Imported, dataset: str | None) -> None:
        if "backbone.cls_token" in imported.left_over:
            imported.left_over.remove("backbone.cls_token")
            imported.notes.append("backbone.cls_token dropped: no layer reads it")
        split_decoders(imported.tensors)
        imported.notes += merge_experts(imported.tensors, dataset)

    def disassemble(self, tensors: StateDict) -> StateDict:
        return join_decoders(tensors)


class MMPose1(Layout):
    """mmpose 1.x with the backbone of mmpretrain: a position table without the class slot."""

    name = "mmpose1"
    mark = "backbone.patch_embed.projection.weight"
    wraps = True
    renaming = Renaming(MMPOSE1_NAMES)

    def assemble(self, imported: Imported, dataset: str | None) -> None:
        table = imported.tensors.get(POSITIONS)
        if table is not None and table.dim() == 3:
            imported.tensors[POSITIONS] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)

    def disassemble(self, tensors: StateDict) -> StateDict:
        table = tensors.get(POSITIONS)
        if table is not None:
            slot, rows = table[:, :1], table[:, 1:]
            # A slot of zeros is cut off rather than added: -0.0 + 0.0 would lose its sign.
            tensors[POSITIONS] = rows + slot if slot.any() else rows.clone()
        return tensors


class Transformers(Layout):
    """VitPoseForPoseEstimation of transformers: query, key and value apart."""

    name = "transformers"
    mark = "backbone.embeddings.patch_embeddings.projection.weight"
    renaming = Renaming(TRANSFORMERS_NAMES)

    def assemble(self, imported: Imported, dataset: str | None) -> None:
        tensors = imported.tensors
        for name in [name for name in tensors if ".attn.query." in name]:
            thirds = [name.replace(".query.", f".{third}.") for third in _THIRDS]
            for third in thirds:
                shape = tuple(tensors[third].shape) if third in tensors else None
                if shape != tuple(tensors[name].shape):
                    raise UserError(
                        f"{third} {'is missing' if shape is None else f'has shape {shape}'}; "
                        f"expected {tuple(tensors[name].shape)}, as {name}."
                    )
            joined = torch.cat([tensors.pop(third) for third in thirds])
            tensors[name.replace(".query.", ".qkv.")] = joined
        imported.notes += merge_experts(tensors, dataset)

    def disassemble(self, tensors: StateDict) -> StateDict:
        deconvs = sum(
            name.startswith("keypoint_head.deconv_layers.") and tensor.dim() == 4
            for name, tensor in tensors.items()
        )
        if deconvs not in (0, 2):
            raise UserError(
                f"checkpoint has {deconvs} deconvolutions; expected 2 or none for transformers."
            )
        for name in [name for name in tensors if ".attn.qkv." in name]:
            for third, part in zip(_THIRDS, tensors.pop(name).chunk(3), strict=True):
                # A clone: a view would be saved with the storage of all three.
                tensors[name.replace(".qkv.", f".{third}.")] = part.clone()
        return tensors


_THIRDS = ("query", "key", "value")

# Ours before the official one, whose mark it has too.
LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (Layout(), Transformers(), MMPose1(), Official())
}
