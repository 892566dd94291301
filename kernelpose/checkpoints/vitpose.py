"""The sizes of a ViTPose, read from the shapes in a checkpoint."""

from __future__ import annotations

import re
from typing import Any

from kernelpose.checkpoints.files import StateDict
from kernelpose.checkpoints.layouts import (
    GRID,
    POSITIONS,
    STRIDE,
    WINDOWS,
)
from kernelpose.checkpoints.shapes import decoder_of, numbered, sizes_of
from kernelpose.errors import UserError
from kernelpose.models.position import guess_grid
from kernelpose.models.vit import PATCH_PADDING, window_table
from kernelpose.models.vitpose import ATTENTIONS, SIZES, layer_attentions

_BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")


def config_of(
    tensors: StateDict,
    *,
    num_heads: int | None = None,
    grid: tuple[int, int] | None = None,
    patch_stride: int | None = None,
) -> dict[str, Any]:
    """Arguments of ViTPose for tensors in our names, without the layer_norm_eps."""
    dim, hidden = sizes_of(tensors, "backbone.blocks.0.mlp.fc1.weight", 2, (1, 0))
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
    decoder = decoder_of(tensors)
    deconvs = decoder["deconv_channels"] or ()
    if patch_stride is None:
        patch_stride = _recorded_stride(tensors) or (4 * 2 ** len(deconvs) if deconvs else 16)
    if patch_stride not in (8, 16):
        raise UserError(f"checkpoint has {len(deconvs)} deconvolutions; expected 1, 2 or none.")
    rows, columns = source_grid(tensors, grid)
    return {
        "embed_dim": dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": hidden / dim,
        "image_size": (rows * patch_stride, columns * patch_stride),
        "patch_stride": patch_stride,
        **decoder,
        "decoder": decoder["decoder"] or "classic",
        "drop_path": released[0]["drop_path"] if released else 0.0,
        **recorded_attention(tensors),
    }


def flat_grid(tensors: StateDict) -> tuple[int, int] | None:
    """A grid for a table that does not record it, which the shapes do not depend on."""
    table = tensors.get(POSITIONS)
    unknown = table is not None and table.dim() == 3 and GRID not in tensors
    return (1, table.shape[1] - 1) if table is not None and unknown else None


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
    return numbered(tensors, _BLOCK, "blocks")


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
    (rows,) = sizes_of(tensors, POSITIONS, 3, (1,))
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
