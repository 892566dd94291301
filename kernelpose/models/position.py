"""The learned position table of a ViT and its grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def resize_position_table(
    table: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]
) -> torch.Tensor:
    """Resamples a position table (1, 1 + rows * columns, C) to another grid.

    Row 0, the slot of the class token, has no place on the grid and is kept. The others are
    resized bicubically (corners not aligned) in float32, as the released ViTPose code does.

    Raises ValueError if the table does not hold 1 + rows * columns rows.
    """
    rows, columns = grid
    if table.dim() != 3 or table.shape[0] != 1 or table.shape[1] != rows * columns + 1:
        raise ValueError(
            f"table has shape {tuple(table.shape)}; expected (1, {rows * columns + 1}, C) for a "
            f"grid of {rows}x{columns}."
        )
    if new_grid == grid:
        return table
    tokens = table[:, 1:].float().reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(tokens, size=new_grid, mode="bicubic", align_corners=False)
    tokens = resized.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([table[:, :1], tokens], dim=1)


def guess_grid(tokens: int) -> tuple[int, int] | None:
    """The grid (rows, columns) of a table that does not record it: 4:3 portrait, else square.

    Every released ViTPose table has one of the two shapes, and no number of tokens fits both
    (12 k^2 is never a square). None where neither fits.
    """
    k = math.isqrt(tokens // 12)
    if k and 12 * k * k == tokens:
        return 4 * k, 3 * k
    side = math.isqrt(tokens)
    return (side, side) if side and side * side == tokens else None
