"""Attention of groups of channels in a cascade, to keys and values of a reduced map, in Triton.

What is computed: `kernelpose/reference/cascaded_attention.py`.

    keys kernel       one program: PLACES places of the reduced map, from all their queries to keys
                      and values (B, M, 2, d)
    queries kernel    one program: BLOCK queries, from x and what the group before found to what
                      this one finds; head by head, all products in registers

Two launches a group, as every query wants all keys of its image. No atomics: the same bits on every
run.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cells import attend, dot, load_tile, nowhere, store_tile
from .window_attention_tiles import Tile, block_d, launch_options

# Sizes of the maps change from layer to layer: they must not cost a compilation each.
SIZES = ["group", "groups", "height", "width", "heads", "keys", "tiles"]


class Tiles(NamedTuple):
    """Of a group's width: the tile of queries by keys, and that of places by queries of each."""

    queries: Tile
    keys: Tile


OUTPUTS = tl.constexpr(32)
"""Keys' and values' channels that a program makes at once."""

# (element size, block_d of a group) -> tiles. Chosen by what compiles without spilling registers on
# sm_80 and sm_90; nothing here was timed on a GPU yet.
TILES = {
    (2, 16): Tiles(Tile(64, 64, 4, 1, 168, 16384), Tile(16, 8, 2, 1, 168, 4096)),
    (2, 32): Tiles(Tile(64, 64, 4, 1, 255, 16384), Tile(16, 8, 4, 1, 168, 8192)),
    (2, 64): Tiles(Tile(64, 64, 4, 1, 255, 32768), Tile(16, 8, 8, 1, 128, 16384)),
    (2, 128): Tiles(Tile(64, 64, 8, 1, 255, 65536), Tile(16, 8, 8, 1, 255, 32768)),
    (4, 16): Tiles(Tile(32, 32, 4, 1, 168, 16384), Tile(16, 8, 4, 1, 168, 8192)),
    (4, 32): Tiles(Tile(32, 32, 4, 1, 255, 32768), Tile(16, 8, 4, 1, 168, 16384)),
    (4, 64): Tiles(Tile(32, 32, 8, 1, 255, 65536), Tile(16, 8, 8, 1, 168, 32768)),
    (4, 128): Tiles(Tile(16, 16, 8, 1, 255, 98304), Tile(16, 2, 8, 1, 255, 32768)),
}


@triton.jit
def _norm(values, inside, eps, D: tl.constexpr):
    """LayerNorm of rows without weight and bias; zeros where not inside."""
    centered = tl.where(inside, values - tl.sum(values, 1)[:, None] / D, 0.0)
    return centered * tl.rsqrt(tl.sum(centered * centered, 1) / D + eps)[:, None]


@triton.jit(do_not_specialize=SIZES)
def _cascaded_attention_keys_kernel(
    x,  # (B, H, W, groups, D)
    found,  # (B, H, W, groups, D): read of the group before
    reduce_weight,  # (groups, D, RATIO, RATIO)
    reduce_bias,
    kv_weight,  # (groups, 2, D, D)
    kv_bias,
    kv,  # (B, M, 2, D): written
    group,
    groups,
    height,
    width,
    tiles,
    eps,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: keys and values of BLOCK places of an image, of STEP queries each at a time."""
    AREA: tl.constexpr = RATIO * RATIO
    element = x.dtype.element_ty
    group = group.to(tl.int64)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    columns = width // RATIO
    keys = height // RATIO * columns
    places = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    valid = places < keys
    earlier = places < keys * tl.minimum(group, 1)  # none before the first group
    corner = places // columns * RATIO * width + places % columns * RATIO
    lanes = tl.arange(0, BLOCK_D)
    inner_lanes = (lanes < D)[None, None, :]
    x_base = x + image * height * width * groups * D + group * D
    before_base = found + image * height * width * groups * D + (group - 1) * D
    weight_base = reduce_weight + group * D * AREA
    sums = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, AREA, STEP):
        inner = start + tl.arange(0, STEP)
        token = corner[:, None] + (inner // RATIO * width + inner % RATIO)[None, :]
        offsets = token.to(tl.int64)[:, :, None] * (groups * D) + lanes[None, None, :]
        inside = valid[:, None, None] & (inner < AREA)[None, :, None] & inner_lanes
        own = tl.load(x_base + offsets, mask=inside, other=0.0)
        before = tl.load(before_base + offsets, mask=inside & earlier[:, None, None], other=0.0)
        u = (own.to(tl.float32) + before.to(tl.float32)).to(element)
        weights = tl.load(
            weight_base + lanes[None, :] * AREA + inner[:, None],
            mask=(inner < AREA)[:, None] & (lanes < D)[None, :],
            other=0.0,
        )
        sums += tl.sum(u.to(tl.float32) * weights.to(tl.float32)[None, :, :], 1)
    sums += tl.load(reduce_bias + group * D + lanes, mask=lanes < D, other=0.0).to(tl.float32)
    normed = _norm(sums, (lanes < D)[None, :], eps, D).to(element)
    for first in range(0, 2 * D, OUTPUTS):
        outputs = first + tl.arange(0, OUTPUTS)
        known = outputs < 2 * D
        weight = load_tile(kv_weight + group * 2 * D * D, outputs, known, D, D, BLOCK_D)
        bias = tl.load(kv_bias + group * 2 * D + outputs, mask=known, other=0.0)
        result = dot(normed, tl.trans(weight)) + bias.to(tl.float32)[None, :]
        to = kv + (image * keys + places)[:, None] * (2 * D) + outputs[None, :]
        tl.store(to, result.to(element), mask=valid[:, None] & known[None, :])


@triton.jit(do_not_specialize=SIZES)
def _cascaded_attention_queries_kernel(
    x,
    found,  # read of the group before, written of this one
    q_weight,  # (groups, D, D)
    q_bias,
    kv,
    out_weight,  # (groups, D, D)
    out_bias,
    norm_weight,
    norm_bias,
    group,
    groups,
    height,
    width,
    heads,
    keys,
    tiles,
    scale,
    eps,
    D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: what a group finds for BLOCK queries of an image."""
    element = x.dtype.element_ty
    group = group.to(tl.int64)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = rows < height * width
    earlier = rows < height * width * tl.minimum(group, 1)  # none before the first group
    lanes = tl.arange(0, BLOCK_D)
    head_lanes = tl.arange(0, BLOCK_HEAD)
    stride = groups * D
    base = image * height * width * stride + group * D
    own = load_tile(x + base, rows, inside, stride, D, BLOCK_D)
    before = load_tile(found + base - D, rows, earlier, stride, D, BLOCK_D)
    u = (own.to(tl.float32) + before.to(tl.float32)).to(element).to(tl.float32)
    normed = _norm(u, (lanes < D)[None, :], eps, D).to(element)
    y = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for head in range(heads):
        first = head * HEAD_DIM
        weight = load_tile(
            q_weight + (group * D + first) * D, head_lanes, head_lanes < HEAD_DIM, D, D, BLOCK_D
        )
        bias = tl.load(
            q_bias + group * D + first + head_lanes, mask=head_lanes < HEAD_DIM, other=0.0
        )
        q = (dot(normed, tl.trans(weight)) + bias.to(tl.float32)[None, :]).to(element)
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        acc = tl.zeros((BLOCK, BLOCK_HEAD), tl.float32)
        kv_base = kv + image * keys * 2 * D + first
        for start in range(0, keys, STEP):
            columns = start + tl.arange(0, STEP)
            valid = columns < keys
            k = load_tile(kv_base, columns, valid, 2 * D, HEAD_DIM, BLOCK_HEAD)
            v = load_tile(kv_base + D, columns, valid, 2 * D, HEAD_DIM, BLOCK_HEAD)
            top, total, acc = attend(q, k, v, nowhere(valid)[None, :], scale, top, total, acc)
        weight = load_tile(
            out_weight + group * D * D + first, lanes, lanes < D, D, HEAD_DIM, BLOCK_HEAD
        )
        y += dot((acc / total[:, None]).to(element), tl.trans(weight))
    row = group * D + lanes
    y += tl.load(out_bias + row, mask=lanes < D, other=0.0).to(tl.float32)[None, :]
    y = _norm(y, (lanes < D)[None, :], eps, D)
    y *= tl.load(norm_weight + row, mask=lanes < D, other=0.0).to(tl.float32)[None, :]
    y += tl.load(norm_bias + row, mask=lanes < D, other=0.0).to(tl.float32)[None, :]
    store_tile(found + base, rows, inside, stride, y, D, BLOCK_D)


def forward(inputs: Sequence[Tensor], out: Tensor, num_heads: int, eps: float) -> None:
    """Fill out (B, H, W, C). inputs: x, weights and biases as the op takes them; all tensors are
    contiguous, and none is empty.
    """
    x, reduce_weight, reduce_bias, q_weight, q_bias, kv_weight, kv_bias, *last = inputs
    batch, height, width, _ = x.shape
    groups, d = q_bias.shape
    ratio, head_dim = reduce_weight.shape[-1], d // num_heads
    keys = height // ratio * (width // ratio)
    kv = x.new_empty(batch, keys, 2, d)
    tiles = TILES[x.element_size(), block_d(d)]
    key_tiles = triton.cdiv(keys, tiles.keys.block)
    query_tiles = triton.cdiv(height * width, tiles.queries.block)
    with torch.cuda.device_of(x):
        for group in range(groups):
            place = (group, groups, height, width)
            _cascaded_attention_keys_kernel[(batch * key_tiles,)](
                *(x, out, reduce_weight, reduce_bias, kv_weight, kv_bias, kv),
                *(*place, key_tiles, float(eps)),
                RATIO=ratio,
                D=d,
                BLOCK_D=block_d(d),
                BLOCK=tiles.keys.block,
                STEP=min(tiles.keys.step, triton.next_power_of_2(ratio**2)),
                **launch_options(tiles.keys),
            )
            _cascaded_attention_queries_kernel[(batch * query_tiles,)](
                *(x, out, q_weight, q_bias, kv, *last),
                *(*place, num_heads, keys, query_tiles, head_dim**-0.5, float(eps)),
                D=d,
                HEAD_DIM=head_dim,
                BLOCK_D=block_d(d),
                BLOCK_HEAD=block_d(head_dim),
                BLOCK=tiles.queries.block,
                STEP=tiles.queries.step,
                **launch_options(tiles.queries),
            )
