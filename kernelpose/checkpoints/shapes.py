"""What a checkpoint tells of any family: sizes of tensors and of images, and the decoder."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from kernelpose.checkpoints.files import StateDict
from kernelpose.checkpoints.layouts import INPUT_SIZE
from kernelpose.checkpoints.plus import HEAD, HEADS, decoder_names
from kernelpose.errors import UserError


def sizes_of(tensors: StateDict, name: str, dims: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Some sizes of a tensor. Raises UserError unless it is there, with `dims` dimensions."""
    tensor = tensors.get(name)
    if tensor is None or tensor.dim() != dims or 0 in tensor.shape:
        found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
        raise UserError(f"{name} {found}; expected {dims} dimensions, none empty.")
    return tuple(tensor.shape[axis] for axis in axes)


def numbered(names: Iterable[str], pattern: re.Pattern[str], what: str) -> int:
    """How many there are of what `pattern` finds the number of, at the start of names.

    Raises UserError unless they are 0, 1, 2 and so on.
    """
    found = {int(match[1]) for name in names if (match := pattern.match(name))}
    if max(found, default=0) != len(found) - 1:
        raise UserError(
            f"checkpoint numbers its {len(found)} {what} up to {max(found, default=0)}; "
            "expected 0, 1, 2 and so on."
        )
    return len(found)


def decoder_of(tensors: StateDict) -> dict[str, Any]:
    """num_keypoints (17 without a decoder), decoder (None without one) and deconv_channels."""
    names = decoder_names(tensors)
    head = f"{HEADS}{names[0]}." if names else HEAD
    layer = re.compile(re.escape(head) + r"deconv_layers\.(\d+)\.weight")
    widths = {
        int(match[1]): tensor.shape[1]
        for name, tensor in tensors.items()
        if (match := layer.fullmatch(name)) and tensor.dim() == 4
    }
    decoder: str | None
    if f"{head}mlp_head_x.weight" in tensors:
        decoder = "simcc"
    elif widths:
        decoder = "classic"
    else:
        decoder = "simple" if f"{head}final_layer.weight" in tensors else None
    return {
        "num_keypoints": {name: _keypoints(tensors, f"{HEADS}{name}.") for name in names}
        or _keypoints(tensors, HEAD),
        "decoder": decoder,
        "deconv_channels": tuple(widths[index] for index in sorted(widths)) or None,
    }


def recorded_size(tensors: StateDict, least: int) -> tuple[int, int] | None:
    """(height, width) of the images as recorded, or None. Raises UserError for a lesser side."""
    recorded = tensors.get(INPUT_SIZE)
    if recorded is None:
        return None
    if recorded.numel() != 2 or not recorded.isfinite().all() or recorded.min() < least:
        raise UserError(
            f"{INPUT_SIZE} is {recorded.tolist()}; expected a height and a width of at least "
            f"{least}."
        )
    return int(recorded.flatten()[0]), int(recorded.flatten()[1])


def _keypoints(tensors: StateDict, head: str) -> int:
    name = f"{head}final_layer.weight"
    return sizes_of(tensors, name, 4, (0,))[0] if name in tensors else 17
