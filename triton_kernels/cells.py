"""Device functions of the attention kernels: which tokens meet, tiles of them, steps over keys.

The index arithmetic is that of `csrc/include/kernelpose/window_attention.h`. Slots are positions
inside a cell; `tokens_of` turns them into rows of the (H * W) map.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Sizes of the map change from layer to layer: they must not cost a compilation each.
SIZES = [
    *("height", "width", "window_h", "window_w", "lead_h", "lead_w", "cells_h", "cells_w"),
    *("pools_h", "pools_w", "pools", "heads", "tiles", "steps", "images", "share"),
]


@triton.jit
def axis_cell(index, size, window, lead, GRID: tl.constexpr):
    """First position, step and number of tokens of a cell of an axis; none past the end."""
    if GRID:
        first = index
        step = window
        count = (size - index + window - 1) // window
    else:
        first = tl.maximum(lead + (index - 1) * window, 0)
        step = 1
        count = tl.maximum(tl.minimum(lead + index * window, size) - first, 0)
    return first, step, count


@triton.jit
def axis_extent(size, window, GRID: tl.constexpr):
    """Tokens of the largest cell there can be; the bias table has 2 * extent - 1 entries."""
    return (size + window - 1) // window if GRID else window


@triton.jit
def axis_pool(index, pools, window, lead):
    """Rolled window whose mean a cell enters: a shift joins the first cell to the last window."""
    return (index + pools - (lead < window).to(tl.int32)) % pools


@triton.jit
def axis_pool_count(index, pools, size, window, lead, GRID: tl.constexpr):
    """Tokens of a rolled window that exist."""
    shifted = (lead < window).to(tl.int32)
    _, _, count = axis_cell(index + shifted, size, window, lead, GRID)
    wrapped = tl.where(index == pools - 1, tl.minimum(lead, size), 0)
    return count + shifted * wrapped


@triton.jit
def tokens_of(slots, columns, first_y, step_y, first_x, step_x, width):
    """Rows of the (H * W) map for slots of a cell that is `columns` wide."""
    y, x = place_of(slots, columns)
    return (first_y + y * step_y) * width + first_x + x * step_x


@triton.jit
def place_of(slots, columns):
    """Row and column of slots inside a cell: a division, exact for any slot below 2**22."""
    y = ((slots.to(tl.float32) + 0.5) * (1.0 / columns.to(tl.float32))).to(tl.int32)
    return y, slots - y * columns


@triton.jit
def program_of(tiles, heads, cells):
    """Which (tile, head, cell, image) this program has; neighbours share keys, then cache lines."""
    index = tl.program_id(0)
    tile = index % tiles
    head = index // tiles % heads
    cell = index // (tiles * heads) % cells
    return tile, head, cell, (index // (tiles * heads * cells)).to(tl.int64)


@triton.jit
def load_tile(base, rows, valid, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) tile, zero outside."""
    lanes = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + lanes[None, :]
    return tl.load(pointers, mask=valid[:, None] & (lanes < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_tile(base, rows, valid, stride, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    lanes = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + lanes[None, :]
    tile = tile.to(base.dtype.element_ty)
    tl.store(pointers, tile, mask=valid[:, None] & (lanes < HEAD_DIM)[None, :])


@triton.jit
def dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def bias_places(slots, count, columns, extent_w):
    """Where slots lie in the bias table: the entry of a pair is the difference of two places."""
    y, x = place_of(tl.minimum(slots, count - 1), columns)
    return y * (2 * extent_w - 1) + x


@triton.jit
def load_bias(bias, head, queries, keys, extent_h, extent_w):
    """Relative bias, in base 2, of the places of queries and keys, which broadcast to a tile."""
    row = 2 * extent_w - 1
    center = (extent_h - 1) * row + extent_w - 1
    base = bias + head * (2 * extent_h - 1) * row + center
    return tl.load(base + (queries - keys)) * LOG2_E


@triton.jit
def attend(q, k, v, offset, scale, top, total, acc):
    """One step of the online softmax, in base 2: new row maxima, row sums and weighted values.

    `offset` is added to the scaled scores; -inf marks keys that do not exist.
    """
    scores = dot(q, tl.trans(k)) * (scale * LOG2_E) + offset
    new_top = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    acc = acc * rescale[:, None] + dot(p.to(v.dtype), v)
    return new_top, total * rescale + tl.sum(p, 1), acc


@triton.jit
def recompute(a, b, c, d, offset, scale):
    """Probabilities of the scores a @ b.T, and the gradient of the loss with respect to them.

    (a, b, c, d) = (q, k, grad_out, v) gives (queries, keys), (k, q, v, grad_out) its transpose.
    `offset` is the bias less the queries' log-sum-exp, in base 2.
    The gradient in the scores is p * (dp - delta) with delta, a number a query, the sum of p * dp
    over all its keys, which is also the product of its grad_out and out.

    Tokens that do not exist are zeros with an infinite log-sum-exp: as queries their p is zero; as
    keys they stay in rows that nobody stores, unless they are columns: then `offset` says -inf.
    """
    p = tl.exp2(dot(a, tl.trans(b)) * (scale * LOG2_E) + offset)
    return p, dot(c, tl.trans(d))


@triton.jit
def nowhere(valid):
    """0 where valid, else -inf."""
    return tl.where(valid, 0.0, float("-inf"))
