"""Windowed attention over a token map in Triton, forward and backward.

What is computed: `kernelpose/reference/window_attention.py`. Which tokens meet is index arithmetic,
as in `csrc/include/kernelpose/window_attention.h`: each axis is cut into cells, and tokens attend
to each other when they share a row cell and a column cell. A shift only moves the cuts (`lead` is
the length of the first cell), so nothing is rolled, masked, padded, permuted or copied: the
kernels compute the address of every token in the unpartitioned map.

    packed map (B, H, W, 3, heads, d)            one program: a tile of one cell's queries, one head
    +----+--------+--------+                             keys, BLOCK at a time
    |cell|  cell  |  cell  |                        +------+------+------+ +--------+
    +----+--------+--------+          queries       |      | S, P |      | | pooled |
    |cell|  cell  |  cell  |   ---->  BLOCK rows    +------+------+------+ +--------+
    |    |        |        |                        softmax and sums in float32 registers
    +----+--------+--------+

Rows of a tile are slots (positions inside the cell) until `tokens_of` turns them into rows of the
map. Every sum has one owner and one order: no atomics, the same bits on every run.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cells import (
    LN_2,
    SIZES,
    attend,
    axis_cell,
    axis_extent,
    bias_places,
    load_bias,
    load_tile,
    program_of,
    store_tile,
    tokens_of,
)
from .window_attention_backward import (
    _window_attention_backward_kernel,
    _window_attention_bias_backward_kernel,
    _window_attention_bias_reduce_kernel,
    _window_attention_delta_kernel,
    _window_attention_pool_backward_kernel,
)
from .window_attention_tiles import (
    BACKWARD,
    BACKWARD_WITH_BIAS,
    BIAS_BACKWARD,
    BIAS_PROGRAMS,
    BIAS_REDUCE,
    FORWARD,
    POOL,
    POOL_BACKWARD,
    POOL_BLOCK,
    head_options,
    launch_options,
    tile_for,
)


@triton.jit(do_not_specialize=SIZES)
def _window_attention_pool_kernel(
    qkv,  # (B, H, W, 3, heads, d)
    pooled,  # (B, pools, 2, heads, d): mean key and mean value of every rolled window
    height,
    width,
    window_h,
    window_w,
    lead_h,
    lead_w,
    pools_h,
    pools_w,
    heads,
    HEAD_DIM: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_C of the 2C key and value channels of one rolled window of one image."""
    channels = 2 * heads * HEAD_DIM
    blocks = tl.cdiv(channels, BLOCK_C)
    pool = tl.program_id(0) // blocks % (pools_h * pools_w)
    image = (tl.program_id(0) // (blocks * pools_h * pools_w)).to(tl.int64)
    lanes = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first_y, first_x = pool // pools_w, pool % pools_w
    rows = axis_extent(height, window_h, GRID)
    columns = axis_extent(width, window_w, GRID)
    base = qkv + (image * height * width * 3 + 1) * heads * HEAD_DIM
    total = tl.zeros((BLOCK_C,), tl.float32)
    count = 0
    for start in range(0, rows * columns, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        if GRID:
            y = first_y + slots // columns * window_h
            x = first_x + slots % columns * window_w
        else:  # a lead of a whole window is no shift
            y = (first_y * window_h + slots // columns + lead_h % window_h) % (pools_h * window_h)
            x = (first_x * window_w + slots % columns + lead_w % window_w) % (pools_w * window_w)
        valid = (slots < rows * columns) & (y < height) & (x < width)
        offsets = (y * width + x).to(tl.int64)[:, None] * (3 * heads * HEAD_DIM) + lanes[None, :]
        tile = tl.load(base + offsets, mask=valid[:, None] & (lanes < channels)[None, :], other=0.0)
        total += tl.sum(tile.to(tl.float32), 0)
        count += tl.sum(valid.to(tl.int32), 0)
    pointers = pooled + (image * pools_h * pools_w + pool) * channels + lanes
    tl.store(pointers, (total / count).to(pooled.dtype.element_ty), mask=lanes < channels)


@triton.jit(do_not_specialize=SIZES)
def _window_attention_forward_kernel(
    qkv,  # (B, H, W, 3, heads, d)
    bias,  # (heads, entries) float32, or None
    pooled,  # (B, pools, 2, heads, d), or None
    out,  # (B, H, W, heads, d)
    lse,  # (B, heads, H, W) float32
    height,
    width,
    window_h,
    window_w,
    lead_h,
    lead_w,
    cells_h,
    cells_w,
    pools,
    heads,
    tiles,
    scale,
    HEAD_DIM: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program: BLOCK queries of one cell, head and image against all their keys."""
    tile, head, cell, image = program_of(tiles, heads, cells_h * cells_w)
    first_y, step_y, rows = axis_cell(cell // cells_w, height, window_h, lead_h, GRID)
    first_x, step_x, columns = axis_cell(cell % cells_w, width, window_w, lead_w, GRID)
    count = rows * columns
    if tile * BLOCK >= count:
        return
    channels = heads * HEAD_DIM
    q_base = qkv + image * height * width * 3 * channels + head * HEAD_DIM

    slots = tile * BLOCK + tl.arange(0, BLOCK)
    inside = slots < count
    tokens = tokens_of(slots, columns, first_y, step_y, first_x, step_x, width)
    q = load_tile(q_base, tokens, inside, 3 * channels, HEAD_DIM, BLOCK_D)
    if bias is not None:
        extent_h = axis_extent(height, window_h, GRID)
        extent_w = axis_extent(width, window_w, GRID)
        places = bias_places(slots, count, columns, extent_w)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, count, STEP):
        keys = start + tl.arange(0, STEP)
        valid = keys < count
        key_tokens = tokens_of(keys, columns, first_y, step_y, first_x, step_x, width)
        k = load_tile(q_base + channels, key_tokens, valid, 3 * channels, HEAD_DIM, BLOCK_D)
        v = load_tile(q_base + 2 * channels, key_tokens, valid, 3 * channels, HEAD_DIM, BLOCK_D)
        offset = tl.where(valid, 0.0, float("-inf"))[None, :]
        if bias is not None:
            key_places = bias_places(keys, count, columns, extent_w)
            offset += load_bias(
                bias, head, places[:, None], key_places[None, :], extent_h, extent_w
            )
        top, total, acc = attend(q, k, v, offset, scale, top, total, acc)
    if pooled is not None:
        pool_base = pooled + image * pools * 2 * channels + head * HEAD_DIM
        for start in range(0, pools, BLOCK_P):
            keys = start + tl.arange(0, BLOCK_P)
            valid = keys < pools
            k = load_tile(pool_base, keys, valid, 2 * channels, HEAD_DIM, BLOCK_D)
            v = load_tile(pool_base + channels, keys, valid, 2 * channels, HEAD_DIM, BLOCK_D)
            offset = tl.where(valid, 0.0, float("-inf"))[None, :]
            top, total, acc = attend(q, k, v, offset, scale, top, total, acc)
    out_base = out + image * height * width * channels + head * HEAD_DIM
    store_tile(out_base, tokens, inside, channels, acc / total[:, None], HEAD_DIM, BLOCK_D)
    lse_base = lse + (image * heads + head) * height * width
    tl.store(lse_base + tokens, (top + tl.log2(total)) * LN_2, mask=inside)


class Geometry(NamedTuple):
    """The cuts of a map, as the kernels take them; see `cells.py`."""

    height: int
    width: int
    window_h: int
    window_w: int
    lead_h: int  # tokens of the first cell of an axis, as far as the map goes
    lead_w: int
    grid: bool

    @property
    def map(self) -> tuple[int, ...]:
        return self[:6]

    @property
    def cells(self) -> tuple[int, int]:
        if self.grid:
            return self.window_h, self.window_w
        return (
            1 + triton.cdiv(max(self.height - self.lead_h, 0), self.window_h),
            1 + triton.cdiv(max(self.width - self.lead_w, 0), self.window_w),
        )

    @property
    def pools(self) -> tuple[int, int]:
        """Windows of the rolled map, whose means `pooled` adds to the keys."""
        if self.grid:
            return self.cells
        return triton.cdiv(self.height, self.window_h), triton.cdiv(self.width, self.window_w)

    @property
    def extent(self) -> tuple[int, int]:
        """Sides of the largest cell there can be."""
        if self.grid:
            return triton.cdiv(self.height, self.window_h), triton.cdiv(self.width, self.window_w)
        return self.window_h, self.window_w

    @property
    def largest(self) -> int:
        """Tokens of the largest cell there is."""
        return min(self.extent[0], self.height) * min(self.extent[1], self.width)


def _geometry(
    qkv: Tensor, window: tuple[int, int], shift: tuple[int, int], partition: str
) -> Geometry:
    height, width = qkv.shape[1:3]
    if partition == "grid":  # a patch larger than the map is the map
        window = min(window[0], height), min(window[1], width)
    return Geometry(
        height, width, *window, shift[0] or window[0], shift[1] or window[1], partition == "grid"
    )


def forward(
    qkv: Tensor,
    bias_table: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    partition: str,
    pooled: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over qkv (B, H, W, 3C), contiguous, in its own dtype.

    Returns out (B, H, W, C) and the natural log-sum-exp of every query's scores, (B, heads, H, W)
    float32, which `backward` needs.
    """
    batch, height, width, channels = qkv.shape
    head_dim = channels // 3 // num_heads
    geometry = _geometry(qkv, window, shift, partition)
    out = qkv.new_empty(batch, height, width, channels // 3)
    lse = qkv.new_empty(batch, num_heads, height, width, dtype=torch.float32)
    if batch == 0:
        return out, lse
    tile = tile_for(FORWARD, qkv, head_dim, geometry.largest)
    tiles = triton.cdiv(geometry.largest, tile.block)
    with torch.cuda.device_of(qkv):
        _window_attention_forward_kernel[(batch * math.prod(geometry.cells) * num_heads * tiles,)](
            qkv,
            None if bias_table is None else bias_table.t().contiguous(),
            _pool(qkv, num_heads, geometry) if pooled else None,
            out,
            lse,
            *geometry.map,
            *geometry.cells,
            math.prod(geometry.pools),
            num_heads,
            tiles,
            scale,
            GRID=geometry.grid,
            BLOCK=tile.block,
            STEP=tile.step,
            BLOCK_P=POOL_BLOCK,
            **head_options(tile, head_dim),
        )
    return out, lse


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    partition: str,
    pooled: bool,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of qkv (its dtype) and of bias_table (float32), from what `forward` returned."""
    batch, height, width, channels = qkv.shape
    head_dim = channels // 3 // num_heads
    geometry = _geometry(qkv, window, shift, partition)
    grad_qkv = torch.empty_like(qkv)
    if batch == 0:
        return grad_qkv, None if bias_table is None else torch.zeros_like(bias_table)
    bias = None if bias_table is None else bias_table.t().contiguous()
    tile = tile_for(
        BACKWARD if bias is None else BACKWARD_WITH_BIAS, qkv, head_dim, geometry.largest
    )
    tiles = triton.cdiv(geometry.largest, tile.block)
    one_tile = geometry.largest <= tile.block == tile.step
    map_tiles = triton.cdiv(height * width, tile.block)
    options = head_options(tile, head_dim)
    with torch.cuda.device_of(qkv):
        delta = pooled_keys = grad_pooled = None
        if pooled or not one_tile or bias is not None:
            delta = torch.empty_like(lse)
        if pooled or not one_tile:  # else the backward kernel finds delta itself
            _window_attention_delta_kernel[(batch * num_heads * map_tiles,)](
                *(grad_out, out, delta, height, width, num_heads, map_tiles),
                BLOCK=tile.block,
                **options,
            )
        if pooled:
            pooled_keys = _pool(qkv, num_heads, geometry)
            grad_pooled = torch.empty_like(pooled_keys, dtype=torch.float32)
            pool_tile = tile_for(POOL_BACKWARD, qkv, head_dim, POOL_BLOCK)
            pool_tiles = triton.cdiv(math.prod(geometry.pools), POOL_BLOCK)
            _window_attention_pool_backward_kernel[(batch * num_heads * pool_tiles,)](
                *(qkv, pooled_keys, grad_out, lse, delta, grad_pooled),
                *geometry.map,
                *geometry.pools,
                *(num_heads, pool_tiles, scale),
                GRID=geometry.grid,
                BLOCK_P=POOL_BLOCK,
                STEP=pool_tile.step,
                **head_options(pool_tile, head_dim),
            )
        _window_attention_backward_kernel[(batch * math.prod(geometry.cells) * num_heads * tiles,)](
            *(qkv, bias, pooled_keys, grad_out, lse, delta, grad_pooled, grad_qkv),
            *geometry.map,
            *geometry.cells,
            *geometry.pools,
            *(num_heads, tiles, scale),
            GRID=geometry.grid,
            ONE_TILE=one_tile,
            BLOCK_P=POOL_BLOCK,
            BLOCK=tile.block,
            STEP=tile.step,
            **options,
        )
        if bias is None:
            return grad_qkv, None
        # Score gradients of one pair of slots are summed over all cells in two steps: chunks of
        # cells in registers, then the chunks in order. Programs enough to fill a GPU.
        extent = math.prod(geometry.extent)
        tile = tile_for(BIAS_BACKWARD, qkv, head_dim, extent)
        tiles, steps = triton.cdiv(extent, tile.block), triton.cdiv(extent, tile.step)
        programs = num_heads * tiles * steps
        slices = batch * math.prod(geometry.cells)
        share = triton.cdiv(slices, max(1, BIAS_PROGRAMS // programs))
        chunks = triton.cdiv(slices, share)
        partial = lse.new_empty(chunks, num_heads, extent, extent)
        _window_attention_bias_backward_kernel[(chunks * programs,)](
            *(qkv, bias, grad_out, lse, delta, partial),
            *geometry.map,
            *geometry.cells,
            *(num_heads, tiles, steps, batch, share, scale),
            GRID=geometry.grid,
            BLOCK=tile.block,
            STEP=tile.step,
            **head_options(tile, head_dim),
        )
        grad_bias = lse.new_empty(bias.shape[1], num_heads)
        blocks = triton.cdiv(grad_bias.shape[0], BIAS_REDUCE.block)
        _window_attention_bias_reduce_kernel[(blocks * num_heads,)](
            *(partial.sum(0), grad_bias),
            *geometry.map[:4],
            num_heads,
            GRID=geometry.grid,
            BLOCK=BIAS_REDUCE.block,
            STEP=BIAS_REDUCE.step,
            **launch_options(BIAS_REDUCE),
        )
    return grad_qkv, grad_bias


def _pool(qkv: Tensor, num_heads: int, geometry: Geometry) -> Tensor:
    """(B, pools, 2, heads, d): mean key and mean value of every rolled window."""
    batch, channels = qkv.shape[0], qkv.shape[3]
    head_dim = channels // 3 // num_heads
    pools = math.prod(geometry.pools)
    pooled = qkv.new_empty(batch, pools, 2, num_heads, head_dim)
    _window_attention_pool_kernel[(batch * pools * triton.cdiv(2 * channels // 3, POOL.step),)](
        *(qkv, pooled),
        *geometry.map,
        *geometry.pools,
        num_heads,
        HEAD_DIM=head_dim,
        GRID=geometry.grid,
        BLOCK=POOL.block,
        BLOCK_C=POOL.step,
        **launch_options(POOL),
    )
    return pooled
