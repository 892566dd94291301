"""Attention of a map's queries to the keys and values of a smaller map, in Triton.

What is computed: `kernelpose/reference/reduced_attention.py`.

    q (B, N, heads, d)       one program: a tile of one head's queries        keys and values,
    kv (B, M, 2, heads, d)                    BLOCK rows                      STEP at a time
                                              softmax and sums in registers   (48 of them: once)

The gradients of keys and values are summed over shares of the queries, then the shares in order: no
atomics, the same bits on every run.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cells import attend, dot, load_tile, nowhere, program_of, recompute, store_tile
from .window_attention_tiles import FORWARD, Tile, block_d, head_options, tile_for

# Sizes of the maps change from layer to layer: they must not cost a compilation each.
SIZES = ["images", "queries", "keys", "heads", "tiles", "shares", "share"]
# (element size, block_d) -> rows and columns of a tile, of queries or of keys. As many keys as it
# has columns are at hand at once. Chosen by what compiles without spilling registers on sm_80 and
# sm_90; nothing here was timed on a GPU yet.
BACKWARD = {
    (2, 16): Tile(64, 64, 4, 1, 168, 14336),
    (2, 32): Tile(64, 64, 4, 1, 255, 20480),
    (2, 64): Tile(32, 64, 4, 1, 255, 28672),
    (2, 128): Tile(32, 64, 8, 1, 255, 65536),
    (4, 16): Tile(32, 32, 8, 1, 168, 12288),
    (4, 32): Tile(32, 32, 8, 1, 128, 24576),
    (4, 64): Tile(32, 32, 8, 1, 255, 36864),
    (4, 128): Tile(16, 16, 8, 1, 255, 33792),
}

ENOUGH_PROGRAMS = 264
"""Programs that give each of the 132 multiprocessors of an H100 two."""


@triton.jit(do_not_specialize=SIZES)
def _reduced_attention_forward_kernel(
    q,  # (B, N, heads, d)
    kv,  # (B, M, 2, heads, d)
    out,  # (B, N, heads, d)
    lse,  # (B, heads, N) float32: log2 of the sum of exp of the scores; or None
    queries,
    keys,
    heads,
    tiles,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: BLOCK queries of one head and image against all keys."""
    tile, head, _, image = program_of(tiles, heads, 1)
    channels = heads * HEAD_DIM
    offset = image * queries * channels + head * HEAD_DIM
    k_base = kv + image * keys * 2 * channels + head * HEAD_DIM
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    inside = rows < queries
    own = load_tile(q + offset, rows, inside, channels, HEAD_DIM, BLOCK_D)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, keys, STEP):
        columns = start + tl.arange(0, STEP)
        valid = columns < keys
        k = load_tile(k_base, columns, valid, 2 * channels, HEAD_DIM, BLOCK_D)
        v = load_tile(k_base + channels, columns, valid, 2 * channels, HEAD_DIM, BLOCK_D)
        top, total, acc = attend(own, k, v, nowhere(valid)[None, :], scale, top, total, acc)
    store_tile(out + offset, rows, inside, channels, acc / total[:, None], HEAD_DIM, BLOCK_D)
    if lse is not None:
        lse_base = lse + (image * heads + head) * queries
        tl.store(lse_base + rows, top + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _reduced_attention_queries_kernel(
    q,
    kv,
    grad_out,
    lse,
    delta,  # (B, heads, N) float32: sums of the weights times their gradients
    grad_q,
    queries,
    keys,
    heads,
    tiles,
    scale,
    HEAD_DIM: tl.constexpr,
    ONE_STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: delta and the gradient of BLOCK queries of one head and image.

    All keys are needed for delta before any is for the gradient: ONE_STEP, they are at hand;
    otherwise they pass by twice.
    """
    tile, head, _, image = program_of(tiles, heads, 1)
    channels = heads * HEAD_DIM
    offset = image * queries * channels + head * HEAD_DIM
    k_base = kv + image * keys * 2 * channels + head * HEAD_DIM
    row_base = (image * heads + head) * queries
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    inside = rows < queries
    own = load_tile(q + offset, rows, inside, channels, HEAD_DIM, BLOCK_D)
    do = load_tile(grad_out + offset, rows, inside, channels, HEAD_DIM, BLOCK_D)
    row_lse = tl.load(lse + row_base + rows, mask=inside, other=float("inf"))[:, None]
    row_delta = tl.zeros((BLOCK,), tl.float32)
    dq = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, STEP if ONE_STEP else keys, STEP):
        columns = start + tl.arange(0, STEP)
        valid = columns < keys
        k = load_tile(k_base, columns, valid, 2 * channels, HEAD_DIM, BLOCK_D)
        v = load_tile(k_base + channels, columns, valid, 2 * channels, HEAD_DIM, BLOCK_D)
        p, dp = recompute(own, k, do, v, nowhere(valid)[None, :] - row_lse, scale)
        row_delta += tl.sum(p * dp, 1)
        if ONE_STEP:
            dq = dot((p * (dp - row_delta[:, None])).to(k.dtype), k)
    tl.store(delta + row_base + rows, row_delta, mask=inside)
    if not ONE_STEP:
        for start in range(0, keys, STEP):
            columns = start + tl.arange(0, STEP)
            valid = columns < keys
            k = load_tile(k_base, columns, valid, 2 * channels, HEAD_DIM, BLOCK_D)
            v = load_tile(k_base + channels, columns, valid, 2 * channels, HEAD_DIM, BLOCK_D)
            p, dp = recompute(own, k, do, v, nowhere(valid)[None, :] - row_lse, scale)
            dq += dot((p * (dp - row_delta[:, None])).to(k.dtype), k)
    store_tile(grad_q + offset, rows, inside, channels, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def _reduced_attention_keys_kernel(
    q,
    kv,
    grad_out,
    lse,
    delta,
    grad_kv,  # (shares, B, M, 2, heads, d), float32 where there are several shares
    images,
    queries,
    keys,
    heads,
    tiles,
    shares,
    share,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: BLOCK keys and values of one head and image, over one share of the queries."""
    tile, head, index, image = program_of(tiles, heads, shares)
    channels = heads * HEAD_DIM
    offset = image * queries * channels + head * HEAD_DIM
    k_offset = image * keys * 2 * channels + head * HEAD_DIM
    row_base = (image * heads + head) * queries
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    inside = rows < keys
    k = load_tile(kv + k_offset, rows, inside, 2 * channels, HEAD_DIM, BLOCK_D)
    v = load_tile(kv + k_offset + channels, rows, inside, 2 * channels, HEAD_DIM, BLOCK_D)
    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    first = index * share
    for start in range(first, tl.minimum(first + share, queries), STEP):
        columns = start + tl.arange(0, STEP)
        valid = columns < queries
        step_q = load_tile(q + offset, columns, valid, channels, HEAD_DIM, BLOCK_D)
        do = load_tile(grad_out + offset, columns, valid, channels, HEAD_DIM, BLOCK_D)
        column_lse = tl.load(lse + row_base + columns, mask=valid, other=float("inf"))
        column_delta = tl.load(delta + row_base + columns, mask=valid, other=0.0)
        p, dp = recompute(k, step_q, v, do, -column_lse[None, :], scale)
        dv += dot(p.to(do.dtype), do)
        dk += dot((p * (dp - column_delta[None, :])).to(step_q.dtype), step_q)
    to = grad_kv + index.to(tl.int64) * images * keys * 2 * channels + k_offset
    store_tile(to, rows, inside, 2 * channels, dk * scale, HEAD_DIM, BLOCK_D)
    store_tile(to + channels, rows, inside, 2 * channels, dv, HEAD_DIM, BLOCK_D)


def forward(
    q: Tensor, kv: Tensor, out: Tensor, lse: Tensor | None, num_heads: int, scale: float
) -> None:
    """Fill out (B, N, C), and lse (B, heads, N) float32 unless it is None.

    q (B, N, C) and kv (B, M, 2C) are contiguous, and none is empty.
    """
    batch, queries, channels = q.shape
    keys, head_dim = kv.shape[1], channels // num_heads
    tile = tile_for(FORWARD, q, head_dim, keys)
    tiles = triton.cdiv(queries, tile.block)
    with torch.cuda.device_of(q):
        _reduced_attention_forward_kernel[(batch * num_heads * tiles,)](
            *(q, kv, out, lse, queries, keys, num_heads, tiles, scale),
            BLOCK=tile.block,
            STEP=tile.step,
            **head_options(tile, head_dim),
        )


def backward(
    grad_out: Tensor,
    q: Tensor,
    kv: Tensor,
    lse: Tensor,
    grad_q: Tensor,
    grad_kv: Tensor,
    num_heads: int,
    scale: float,
) -> None:
    """Fill grad_q and grad_kv; all tensors are contiguous, and none is empty."""
    batch, queries, channels = q.shape
    keys, head_dim = kv.shape[1], channels // num_heads
    tile = BACKWARD[q.element_size(), block_d(head_dim)]
    options = head_options(tile, head_dim)
    query_tiles, key_tiles = triton.cdiv(queries, tile.block), triton.cdiv(keys, tile.block)
    wanted = triton.cdiv(ENOUGH_PROGRAMS, batch * num_heads * key_tiles)
    share = triton.cdiv(triton.cdiv(queries, wanted), tile.step) * tile.step
    shares = triton.cdiv(queries, share)
    sums = grad_kv
    if shares > 1:
        sums = grad_kv.new_empty(shares, *grad_kv.shape, dtype=torch.float32)
    delta = torch.empty_like(lse)
    with torch.cuda.device_of(q):
        _reduced_attention_queries_kernel[(batch * num_heads * query_tiles,)](
            *(q, kv, grad_out, lse, delta, grad_q),
            *(queries, keys, num_heads, query_tiles, scale),
            ONE_STEP=keys <= tile.step,
            BLOCK=tile.block,
            STEP=tile.step,
            **options,
        )
        _reduced_attention_keys_kernel[(batch * num_heads * key_tiles * shares,)](
            *(q, kv, grad_out, lse, delta, sums),
            *(batch, queries, keys, num_heads, key_tiles, shares, share, scale),
            BLOCK=tile.block,
            STEP=tile.step,
            **options,
        )
    if shares > 1:
        grad_kv.copy_(sums.sum(0))
