"""Loading a checkpoint of any layout into a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kernelpose.checkpoints.families import detect_layout
from kernelpose.checkpoints.files import StateDict, read_state_dict
from kernelpose.checkpoints.layouts import (
    FORM,
    GRID,
    INPUT_SIZE,
    POSITIONS,
    STRIDE,
    TRANSFORMERS_EPS,
    WINDOWS,
    Imported,
)
from kernelpose.checkpoints.plus import DATASETS, HEAD, HEADS, decoder_names, select_decoder
from kernelpose.checkpoints.pyramid import BACKBONE
from kernelpose.checkpoints.report import CheckpointReport
from kernelpose.checkpoints.vitpose import recorded_attention, source_grid
from kernelpose.errors import UserError
from kernelpose.models.mitpose_released import ReleasedTransformer
from kernelpose.models.position import guess_grid, resize_position_table
from kernelpose.models.vit import VisionTransformer


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    dataset: str | None = None,
    grid: tuple[int, int] | None = None,
    head: bool = True,
) -> CheckpointReport:
    """Loads a checkpoint of any layout into a model, in place.

    Args:
        model: gets the tensors, in its own dtype and on its own device.
        checkpoint: a file, or what it holds, in the official (also easy_ViTPose), mmpose1,
            transformers or kernelpose layout, of any model, or a PVT v2 of its authors, timm or
            mmpose, which fits HRPVT's backbone; with or without "state_dict" around it.
        dataset: whose expert and decoder to take from a checkpoint with several; the decoder that
            a checkpoint with one fills in a model with several. "coco" by default.
        grid: (rows, columns) of the checkpoint's position table, if it does not record it and it
            is not what the table's length suggests.
        head: False loads the encoder alone, for other keypoints.

    Returns a report of what matched, what was missing and what was left over. Raises UserError if
    the file cannot be read, fits nothing in the model or has a tensor of another shape; the model
    is then as it was.
    """
    state_dict = read_state_dict(checkpoint)
    own = model.state_dict()
    if state_dict.keys() == own.keys():
        imported = Imported("kernelpose", state_dict)
    else:
        imported = detect_layout(state_dict).import_(state_dict, dataset)
    tensors = _fit_prefix(_fit_decoders(imported, own, dataset), own)
    if not head:
        own, tensors = _without_decoders(own), _without_decoders(tensors)
        imported.notes.append("decoder left alone, as asked")
    encoder = getattr(model, "backbone", None)
    if isinstance(encoder, VisionTransformer):
        if POSITIONS in tensors:
            _fit_positions(imported, tensors, encoder.grid, grid)
        _note_form(imported, tensors, own)
        eps = encoder.last_norm.eps
        if imported.layout == "transformers" and eps != TRANSFORMERS_EPS:
            imported.notes.append(
                f"transformers runs it with layer_norm_eps={TRANSFORMERS_EPS}, the model has {eps}"
            )
    elif isinstance(encoder, ReleasedTransformer) and POSITIONS in tensors:
        _fit_positions_alone(imported, tensors, encoder.grid, grid)
    for name in (WINDOWS, STRIDE, INPUT_SIZE):  # the model keeps its own form
        tensors.pop(name, None)
        if name in own:
            tensors[name] = own[name]
    matched = {name: tensor for name, tensor in tensors.items() if name in own}
    if all(name in FORM for name in matched):
        raise UserError(
            f"checkpoint holds {len(tensors)} tensors; expected some that the model has."
        )
    for name, tensor in matched.items():
        if tensor.shape != own[name].shape:
            advice = " (head=False loads the encoder alone)" if name.startswith(_DECODERS) else ""
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)}; expected the model's "
                f"{tuple(own[name].shape)}{advice}."
            )
    model.load_state_dict(matched, strict=False)
    return CheckpointReport(
        imported.layout,
        # Not what was put beside the parameters for a layout that does not record it.
        tuple(name for name in matched if name not in FORM or name in state_dict),
        tuple(name for name in own if name not in matched),
        tuple(imported.left_over) + tuple(name for name in tensors if name not in own),
        tuple(imported.notes),
    )


_DECODERS = (HEAD, HEADS)


def _without_decoders(tensors: StateDict) -> StateDict:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_DECODERS)}


def _fit_decoders(imported: Imported, own: StateDict, dataset: str | None) -> StateDict:
    """Gives the checkpoint's decoders the names that the model's have."""
    tensors = imported.tensors
    mine, theirs = decoder_names(own), decoder_names(tensors)
    if theirs and not mine and any(name.startswith(HEAD) for name in own):
        imported.notes.append(f"decoder taken of {', '.join(theirs)}: {dataset or DATASETS[0]}")
        return select_decoder(tensors, dataset)
    if mine and not theirs:
        prefix = f"{HEADS}{dataset or DATASETS[0]}."
        return {
            prefix + name.removeprefix(HEAD) if name.startswith(HEAD) else name: tensor
            for name, tensor in tensors.items()
        }
    return tensors


def _fit_prefix(tensors: StateDict, own: StateDict) -> StateDict:
    """An encoder alone finds its place in a whole model, and the other way round."""

    def fitted(name: str) -> str:
        candidates = (name, BACKBONE + name, name.removeprefix(BACKBONE))
        return next((candidate for candidate in candidates if candidate in own), name)

    return {fitted(name): tensor for name, tensor in tensors.items()}


def _fit_positions(
    imported: Imported,
    tensors: StateDict,
    model_grid: tuple[int, int],
    grid: tuple[int, int] | None,
) -> None:
    """Resizes the position table, in `tensors`, from its grid to the model's."""
    table = tensors[POSITIONS]
    if grid is None and GRID not in tensors and table.dim() == 3:
        tokens = table.shape[1] - 1
        guess = guess_grid(tokens)
        if tokens == model_grid[0] * model_grid[1]:
            if guess not in (None, model_grid):
                raise UserError(
                    f"grid is None; expected (rows, columns) of a position table of {tokens} "
                    f"tokens, which may be {_by(guess or model_grid)} or the model's "
                    f"{_by(model_grid)}."
                )
            grid = model_grid
    source = source_grid(tensors, grid)
    tensors[GRID] = torch.tensor(model_grid)
    if source != model_grid:
        tensors[POSITIONS] = resize_position_table(table, source, model_grid)
        imported.notes.append(f"position table resized from {_by(source)} to {_by(model_grid)}")


def _fit_positions_alone(
    imported: Imported,
    tensors: StateDict,
    model_grid: tuple[int, int],
    grid: tuple[int, int] | None,
) -> None:
    """The same for a table without a class slot, whose grid nothing records."""
    table = tensors[POSITIONS]
    if table.dim() == 3 and table.shape[1] > 0:
        slotted = {POSITIONS: torch.cat((table[:, :1], table), 1)}
        _fit_positions(imported, slotted, model_grid, grid)
        tensors[POSITIONS] = slotted[POSITIONS][:, 1:]


def _note_form(imported: Imported, tensors: StateDict, own: StateDict) -> None:
    """Says so where the checkpoint records another form than the model has."""
    if imported.layout == "kernelpose":
        theirs, mine = recorded_attention(tensors), recorded_attention(own)
        if theirs != mine:
            imported.notes.append(
                f"trained with {_in_words(theirs)}, the model has {_in_words(mine)}"
            )


def _in_words(attention: dict[str, Any]) -> str:
    options = attention or {"attention": "full"}
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"
