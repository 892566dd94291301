"""Converting a checkpoint from any layout to any other.

Ours stands in the middle. Into ours and back returns every tensor bit for bit, for each layout,
except for what a layout cannot hold: experts and class tokens do not come back, and mmpose 1.x has
no row 0 in its position table, so a row 0 that is not zero is added into the others for good.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kernelpose.checkpoints.families import Family, detect
from kernelpose.checkpoints.files import StateDict, read_state_dict, write_state_dict
from kernelpose.checkpoints.layouts import (
    FORM,
    GRID,
    LAYOUTS,
    POSITIONS,
    TRANSFORMERS_EPS,
    WINDOWS,
    MMPose1,
    Transformers,
)
from kernelpose.checkpoints.plus import decoder_names, select_decoder
from kernelpose.checkpoints.report import CheckpointReport
from kernelpose.checkpoints.vitpose import source_grid
from kernelpose.errors import UserError


def convert_state_dict(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    to: str,
    *,
    dataset: str | None = None,
    grid: tuple[int, int] | None = None,
) -> tuple[StateDict, CheckpointReport]:
    """A checkpoint's tensors in another layout.

    Args:
        checkpoint: a file or what it holds, in any layout.
        to: official, mmpose1, transformers or kernelpose; HRPVT and PVT v2 have all but
            transformers, MiTPOSE has the last and, where mmpose can run it, mmpose1.
        dataset: whose expert and decoder to take, of several. Without it, experts become those of
            coco, and several decoders stay together where the layout allows it.
        grid: (rows, columns) of the position table, for `to="kernelpose"`, if the checkpoint does
            not record it and it is neither 4:3 portrait nor square.

    Returns the state_dict and a report. Raises UserError if the checkpoint cannot be read, is not
    a model of ours, has a tensor of the wrong shape, or does not fit the layout.
    """
    if to not in LAYOUTS:
        raise UserError(f"to is {to!r}; expected one of {', '.join(LAYOUTS)}.")
    state_dict = read_state_dict(checkpoint)
    family, layout = detect(state_dict)
    target = family.layout(to)
    imported = layout.import_(state_dict, dataset)
    tensors, notes = imported.tensors, imported.notes
    missing, unknown = _check(tensors, family)
    several = decoder_names(tensors)
    if several and (dataset or to in ("mmpose1", "transformers")):
        tensors = select_decoder(tensors, dataset)
        notes.append(f"decoder taken of {', '.join(several)}: {dataset or 'coco'}")
    elif dataset and not any(".mlp.experts." in name for name in state_dict):
        raise UserError(
            f"dataset is {dataset!r}; expected None for a checkpoint without experts and several "
            "decoders."
        )
    taken = tuple(tensors)
    if to == "kernelpose":
        if family.has_grid:
            tensors[GRID] = torch.tensor(source_grid(tensors, grid))
    elif WINDOWS in tensors:
        notes.append(f"the {to} layout does not record that its attention is windowed")
    if isinstance(target, MMPose1) and POSITIONS in tensors and tensors[POSITIONS][:, :1].any():
        notes.append("row 0 of the position table added into the others")
    converted, homeless = target.export(tensors)
    if isinstance(target, Transformers) and not isinstance(layout, Transformers):
        notes.append(
            "its layer norms have eps 1e-6; backbone_config.layer_norm_eps is "
            f"{TRANSFORMERS_EPS} by default"
        )
    report = CheckpointReport(
        imported.layout,
        tuple(name for name in taken if name not in unknown and name not in homeless),
        tuple(missing),
        (*imported.left_over, *unknown, *(name for name in homeless if name not in unknown)),
        tuple(notes),
    )
    return converted, report


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    dataset: str | None = None,
    grid: tuple[int, int] | None = None,
) -> CheckpointReport:
    """`convert_state_dict` from file to file; `target` appears complete or not at all.

    The file is torch.save's, or safetensors if `target` ends so. The official (not PVT v2's) and
    mmpose1 layouts are written under "state_dict", as their tools expect.
    """
    state_dict = read_state_dict(source)
    converted, report = convert_state_dict(state_dict, to, dataset=dataset, grid=grid)
    write_state_dict(Path(target), converted, wrap=detect(state_dict)[0].layout(to).wraps)
    return report


def _check(tensors: StateDict, family: Family) -> tuple[list[str], list[str]]:
    """Compares with the model of the same sizes: what is missing, and what it does not know.

    Raises UserError for a wrong shape.
    """
    config = family.config(tensors, num_heads=1, grid=family.flat_grid(tensors))
    with torch.device("meta"):
        expected = family.model(**config).state_dict()
    for name, tensor in tensors.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)}; expected "
                f"{tuple(expected[name].shape)} beside the other tensors."
            )
    missing = [name for name in expected if name not in tensors and name not in FORM]
    return missing, [name for name in tensors if name not in expected]
