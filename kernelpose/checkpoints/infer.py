"""The sizes of a model, read from the shapes in a checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from kernelpose.checkpoints.files import StateDict, read_state_dict
from kernelpose.checkpoints.layouts import (
    GRID,
    POSITIONS,
    STRIDE,
    TRANSFORMERS_EPS,
    WINDOWS,
    Transformers,
    detect_layout,
)
from kernelpose.checkpoints.plus import HEAD, HEADS, decoder_names
from kernelpose.errors import UserError
from kernelpose.models.position import guess_grid
from kernelpose.models.vit import PATCH_PADDING, window_table
from kernelpose.models.vitpose import ATTENTIONS, SIZES, layer_attentions

_BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")


def infer_config(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    num_heads: int | None = None,
    grid: tuple[int, int] | None = None,
    patch_stride: int | None = None,
    dataset: str | None = None,
) -> dict[str, Any]:
    """Arguments of `kernelpose.models.ViTPose` for a checkpoint of any layout.

        model = ViTPose(**infer_config(path))
        load_checkpoint(model, path)

    Args:
        checkpoint: a file, or what it holds.
        num_heads: must be given for widths other than S, B, L and H have; no shape tells it.
        grid: (rows, columns) of the position table, where the checkpoint does not record it and it
            is neither 4:3 portrait nor square.
        patch_stride: 16 or 8; where the checkpoint does not record it, the decoder tells it, but
            for a simple one, where 16 is assumed.
        dataset: whose expert and decoder to take from a ViTPose+ checkpoint ("coco" by default).

    Raises UserError for a checkpoint that cannot be read, and for what it does not tell.
    """
    state_dict = read_state_dict(checkpoint)
    layout = detect_layout(state_dict)
    tensors = layout.import_(state_dict, dataset).tensors
    return {
        **config_of(tensors, num_heads=num_heads, grid=grid, patch_stride=patch_stride),
        "layer_norm_eps": TRANSFORMERS_EPS if isinstance(layout, Transformers) else 1e-6,
    }


def config_of(
    tensors: StateDict,
    *,
    num_heads: int | None = None,
    grid: tuple[int, int] | None = None,
    patch_stride: int | None = None,
) -> dict[str, Any]:
    """`infer_config` for tensors in our names, without the layer_norm_eps."""
    dim, hidden = _size(tensors, "backbone.blocks.0.mlp.fc1.weight", 2, (1, 0))
    depth = _depth(tensors)
    released = [
        size for size in SIZES.values() if (size["embed_dim"], size["depth"]) == (dim, depth)
    ]
    if num_heads is None:
        if not released:
            raise UserError(
                f"num_heads is None; expected a number for a width of {dim} and a depth of {depth}."
            )
        num_heads = released[0]["num_heads"]
    names = decoder_names(tensors)
    head = f"{HEADS}{names[0]}." if names else HEAD
    layer = re.compile(re.escape(head) + r"deconv_layers\.(\d+)\.weight")
    widths = {
        int(match[1]): tensor.shape[1]
        for name, tensor in tensors.items()
        if (match := layer.fullmatch(name)) and tensor.dim() == 4
    }
    deconvs = [widths[index] for index in sorted(widths)]
    if patch_stride is None:
        patch_stride = _recorded_stride(tensors) or (4 * 2 ** len(deconvs) if deconvs else 16)
    if patch_stride not in (8, 16):
        raise UserError(f"checkpoint has {len(deconvs)} deconvolutions; expected 1, 2 or none.")
    rows, columns = source_grid(tensors, grid)
    simple = not deconvs and f"{head}final_layer.weight" in tensors
    return {
        "embed_dim": dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": hidden / dim,
        "num_keypoints": {name: _keypoints(tensors, f"{HEADS}{name}.") for name in names}
        or _keypoints(tensors, HEAD),
        "image_size": (rows * patch_stride, columns * patch_stride),
        "patch_stride": patch_stride,
        "decoder": "simple" if simple else "classic",
        "deconv_channels": tuple(deconvs) or None,
        "drop_path": released[0]["drop_path"] if released else 0.0,
        **recorded_attention(tensors),
    }


def recorded_attention(tensors: StateDict) -> dict[str, Any]:
    """The arguments of ViTPose that repeat the recorded windows; none for full attention.

    Raises UserError for a record that no arguments lead to.
    """
    table = tensors.get(WINDOWS)
    if table is None:
        return {}
    depth = _depth(tensors)
    if table.shape == (depth, 5) and not table.is_floating_point():
        layers = table.tolist()
        windowed = [layer for layer in layers if any(layer)]
        full = depth - len(windowed)
        if windowed and min(windowed[0][:2]) > 0 and (full == 0 or depth % full == 0):
            for attention in ATTENTIONS[1:]:
                form: dict[str, Any] = {
                    "attention": attention,
                    "window": tuple(windowed[0][:2]),
                    "num_full_layers": full,
                }
                if window_table(layer_attentions(depth, **form)).tolist() == layers:
                    return form
    raise UserError(
        f"{WINDOWS} is {table.dtype} {tuple(table.shape)} of no form of ViTPose; expected rows, "
        f"columns, shift rows, shift columns and pooled of each of the {depth} layers."
    )


def _depth(tensors: StateDict) -> int:
    blocks = {int(match[1]) for name in tensors if (match := _BLOCK.match(name))}
    if max(blocks, default=0) != len(blocks) - 1:
        raise UserError(
            f"checkpoint numbers its {len(blocks)} blocks up to {max(blocks, default=0)}; "
            "expected 0, 1, 2 and so on."
        )
    return len(blocks)


def _recorded_stride(tensors: StateDict) -> int | None:
    stride = tensors.get(STRIDE)
    if stride is None:
        return None
    if stride.numel() != 1 or stride.item() not in PATCH_PADDING:
        raise UserError(f"{STRIDE} is {stride.tolist()}; expected 16 or 8.")
    return int(stride)


def source_grid(tensors: StateDict, grid: tuple[int, int] | None) -> tuple[int, int]:
    """The grid of the position table: `grid`, else as recorded, else by its length.

    Raises UserError if the table does not have it, or if nothing tells it.
    """
    (rows,) = _size(tensors, POSITIONS, 3, (1,))
    recorded = tensors.get(GRID)
    if grid is None and recorded is not None:
        if recorded.numel() != 2:
            raise UserError(f"{GRID} has shape {tuple(recorded.shape)}; expected rows and columns.")
        if not recorded.isfinite().all():
            raise UserError(f"{GRID} is {recorded.tolist()}; expected rows and columns.")
        grid = (int(recorded[0]), int(recorded[1]))
    if grid is None:
        grid = guess_grid(rows - 1)
    if grid is None:
        raise UserError(
            f"grid is None; expected (rows, columns) of a position table of {rows - 1} tokens, "
            "which is neither 4:3 portrait nor square."
        )
    if min(grid) < 1 or grid[0] * grid[1] != rows - 1:
        raise UserError(
            f"{POSITIONS} has {rows - 1} tokens; expected {grid[0] * grid[1]} for the grid "
            f"{grid[0]}x{grid[1]}."
        )
    return grid


def _keypoints(tensors: StateDict, head: str) -> int:
    name = f"{head}final_layer.weight"
    return _size(tensors, name, 4, (0,))[0] if name in tensors else 17


def _size(tensors: StateDict, name: str, dims: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    tensor = tensors.get(name)
    if tensor is None or tensor.dim() != dims or 0 in tensor.shape:
        found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
        raise UserError(f"{name} {found}; expected {dims} dimensions, none empty.")
    return tuple(tensor.shape[axis] for axis in axes)
