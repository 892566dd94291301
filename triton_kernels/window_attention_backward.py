"""The backward kernels of windowed attention; `window_attention.py` launches them."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from .cells import (
    LOG2_E,
    SIZES,
    axis_cell,
    axis_extent,
    axis_pool,
    axis_pool_count,
    bias_places,
    dot,
    load_bias,
    load_tile,
    nowhere,
    place_of,
    program_of,
    recompute,
    store_tile,
    tokens_of,
)


@triton.jit(do_not_specialize=SIZES)
def _window_attention_delta_kernel(
    grad_out,  # (B, H, W, heads, d)
    out,
    delta,  # (B, heads, H, W) float32: grad_out . out of every token and head
    height,
    width,
    heads,
    tiles,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK tokens of one head and image."""
    tile, head, _, image = program_of(tiles, heads, 1)
    tokens = tile * BLOCK + tl.arange(0, BLOCK)
    valid = tokens < height * width
    channels = heads * HEAD_DIM
    offset = image * height * width * channels + head * HEAD_DIM
    o = load_tile(out + offset, tokens, valid, channels, HEAD_DIM, BLOCK_D)
    do = load_tile(grad_out + offset, tokens, valid, channels, HEAD_DIM, BLOCK_D)
    delta_base = delta + (image * heads + head) * height * width
    tl.store(delta_base + tokens, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1), mask=valid)


@triton.jit(do_not_specialize=SIZES)
def _window_attention_pool_backward_kernel(
    qkv,
    pooled,
    grad_out,
    lse,
    delta,
    grad_pooled,  # (B, pools, 2, heads, d) float32: what each token of the window adds to its k, v
    height,
    width,
    window_h,
    window_w,
    lead_h,
    lead_w,
    pools_h,
    pools_w,
    heads,
    tiles,
    scale,
    HEAD_DIM: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program: BLOCK_P pooled keys of one head and image against every query of the map."""
    tile, head, _, image = program_of(tiles, heads, 1)
    pools = pools_h * pools_w
    channels = heads * HEAD_DIM
    keys = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = keys < pools
    pool_offset = image * pools * 2 * channels + head * HEAD_DIM
    k = load_tile(pooled + pool_offset, keys, inside, 2 * channels, HEAD_DIM, BLOCK_D)
    v = load_tile(pooled + pool_offset + channels, keys, inside, 2 * channels, HEAD_DIM, BLOCK_D)
    q_base = qkv + image * height * width * 3 * channels + head * HEAD_DIM
    do_base = grad_out + image * height * width * channels + head * HEAD_DIM
    row_offset = (image * heads + head) * height * width
    dk = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, height * width, STEP):
        tokens = start + tl.arange(0, STEP)
        valid = tokens < height * width
        q = load_tile(q_base, tokens, valid, 3 * channels, HEAD_DIM, BLOCK_D)
        do = load_tile(do_base, tokens, valid, channels, HEAD_DIM, BLOCK_D)
        row_lse = tl.load(lse + row_offset + tokens, mask=valid, other=float("inf"))
        row_delta = tl.load(delta + row_offset + tokens, mask=valid, other=0.0)
        p, dp = recompute(k, q, v, do, -row_lse[None, :] * LOG2_E, scale)
        ds = p * (dp - row_delta[None, :])
        dv += dot(p.to(do.dtype), do)
        dk += dot(ds.to(q.dtype), q)
    count = axis_pool_count(keys // pools_w, pools_h, height, window_h, lead_h, GRID)
    count *= axis_pool_count(keys % pools_w, pools_w, width, window_w, lead_w, GRID)
    share = 1.0 / tl.maximum(count, 1).to(tl.float32)[:, None]
    dk_base = grad_pooled + pool_offset
    store_tile(dk_base, keys, inside, 2 * channels, dk * (scale * share), HEAD_DIM, BLOCK_D)
    store_tile(dk_base + channels, keys, inside, 2 * channels, dv * share, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def _window_attention_backward_kernel(
    qkv,
    bias,
    pooled,
    grad_out,
    lse,
    delta,
    grad_pooled,
    grad_qkv,
    height,
    width,
    window_h,
    window_w,
    lead_h,
    lead_w,
    cells_h,
    cells_w,
    pools_h,
    pools_w,
    heads,
    tiles,
    scale,
    HEAD_DIM: tl.constexpr,
    GRID: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program: BLOCK tokens of one cell, head and image, first as keys, then as queries,
    against the tokens of the cell, STEP at a time.

    as keys: dk, dv            as queries: dq              ONE_TILE: the cell is one tile and
    |  #  |                    |     |                     both are the same scores, computed
    |  #  |  down the queries  |#####|  along the keys     once
    |  #  |                    |     |  (and pooled keys)
    """
    tile, head, cell, image = program_of(tiles, heads, cells_h * cells_w)
    first_y, step_y, rows = axis_cell(cell // cells_w, height, window_h, lead_h, GRID)
    first_x, step_x, columns = axis_cell(cell % cells_w, width, window_w, lead_w, GRID)
    count = rows * columns
    if tile * BLOCK >= count:
        return
    channels = heads * HEAD_DIM
    q_offset = image * height * width * 3 * channels + head * HEAD_DIM
    q_base = qkv + q_offset
    do_base = grad_out + image * height * width * channels + head * HEAD_DIM
    row_offset = (image * heads + head) * height * width

    slots = tile * BLOCK + tl.arange(0, BLOCK)
    inside = slots < count
    tokens = tokens_of(slots, columns, first_y, step_y, first_x, step_x, width)
    k = load_tile(q_base + channels, tokens, inside, 3 * channels, HEAD_DIM, BLOCK_D)
    v = load_tile(q_base + 2 * channels, tokens, inside, 3 * channels, HEAD_DIM, BLOCK_D)
    if bias is not None:
        extent_h = axis_extent(height, window_h, GRID)
        extent_w = axis_extent(width, window_w, GRID)
        places = bias_places(slots, count, columns, extent_w)
    if ONE_TILE:
        dq = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, STEP if ONE_TILE else count, STEP):
        queries = start + tl.arange(0, STEP)
        valid = queries < count
        query_tokens = tokens_of(queries, columns, first_y, step_y, first_x, step_x, width)
        q = load_tile(q_base, query_tokens, valid, 3 * channels, HEAD_DIM, BLOCK_D)
        do = load_tile(do_base, query_tokens, valid, channels, HEAD_DIM, BLOCK_D)
        row_lse = tl.load(lse + row_offset + query_tokens, mask=valid, other=float("inf"))
        offset = -row_lse[None, :] * LOG2_E
        if ONE_TILE:  # for dq the keys are columns
            offset += nowhere(inside)[:, None]
        if bias is not None:
            query_places = bias_places(queries, count, columns, extent_w)
            offset += load_bias(
                bias, head, query_places[None, :], places[:, None], extent_h, extent_w
            )
        p, dp = recompute(k, q, v, do, offset, scale)
        if ONE_TILE and pooled is None:  # all keys are here: no need of out
            row_delta = tl.sum(p * dp, 0)
            if bias is not None:
                tl.store(delta + row_offset + query_tokens, row_delta, mask=valid)
        else:
            row_delta = tl.load(delta + row_offset + query_tokens, mask=valid, other=0.0)
        ds = p * (dp - row_delta[None, :])
        dv += dot(p.to(do.dtype), do)
        dk += dot(ds.to(q.dtype), q)
        if ONE_TILE:
            dq += dot(tl.trans(ds.to(k.dtype)), k)
    dk *= scale
    if pooled is not None:
        pool = axis_pool(cell // cells_w, pools_h, window_h, lead_h) * pools_w
        pool += axis_pool(cell % cells_w, pools_w, window_w, lead_w)
        one = tl.full((1,), 0, tl.int32) + pool
        pools = pools_h * pools_w
        pool_offset = image * pools * 2 * channels + head * HEAD_DIM
        dk_base = grad_pooled + pool_offset
        dk += load_tile(dk_base, one, one >= 0, 2 * channels, HEAD_DIM, BLOCK_D)
        dv += load_tile(dk_base + channels, one, one >= 0, 2 * channels, HEAD_DIM, BLOCK_D)
    dq_base = grad_qkv + q_offset
    store_tile(dq_base + channels, tokens, inside, 3 * channels, dk, HEAD_DIM, BLOCK_D)
    store_tile(dq_base + 2 * channels, tokens, inside, 3 * channels, dv, HEAD_DIM, BLOCK_D)

    q = load_tile(q_base, tokens, inside, 3 * channels, HEAD_DIM, BLOCK_D)
    do = load_tile(do_base, tokens, inside, channels, HEAD_DIM, BLOCK_D)
    if not ONE_TILE or pooled is not None:
        row_lse = (
            tl.load(lse + row_offset + tokens, mask=inside, other=float("inf"))[:, None] * LOG2_E
        )
        row_delta = tl.load(delta + row_offset + tokens, mask=inside, other=0.0)[:, None]
    if not ONE_TILE:
        dq = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for start in range(0, count, STEP):
            keys = start + tl.arange(0, STEP)
            valid = keys < count
            key_tokens = tokens_of(keys, columns, first_y, step_y, first_x, step_x, width)
            step_k = load_tile(
                q_base + channels, key_tokens, valid, 3 * channels, HEAD_DIM, BLOCK_D
            )
            step_v = load_tile(
                q_base + 2 * channels, key_tokens, valid, 3 * channels, HEAD_DIM, BLOCK_D
            )
            offset = nowhere(valid)[None, :] - row_lse
            if bias is not None:
                key_places = bias_places(keys, count, columns, extent_w)
                offset += load_bias(
                    bias, head, places[:, None], key_places[None, :], extent_h, extent_w
                )
            p, dp = recompute(q, step_k, do, step_v, offset, scale)
            ds = p * (dp - row_delta)
            dq += dot(ds.to(step_k.dtype), step_k)
    if pooled is not None:
        pool_base = pooled + pool_offset
        for start in range(0, pools, BLOCK_P):
            pool_keys = start + tl.arange(0, BLOCK_P)
            real = pool_keys < pools
            pool_k = load_tile(pool_base, pool_keys, real, 2 * channels, HEAD_DIM, BLOCK_D)
            pool_v = load_tile(
                pool_base + channels, pool_keys, real, 2 * channels, HEAD_DIM, BLOCK_D
            )
            offset = nowhere(real)[None, :] - row_lse
            p, dp = recompute(q, pool_k, do, pool_v, offset, scale)
            ds = p * (dp - row_delta)
            dq += dot(ds.to(pool_k.dtype), pool_k)
    store_tile(dq_base, tokens, inside, 3 * channels, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def _window_attention_bias_backward_kernel(
    qkv,
    bias,
    grad_out,
    lse,
    delta,
    partial,  # (chunks, heads, extent, extent) float32: score gradients, summed over cells
    height,
    width,
    window_h,
    window_w,
    lead_h,
    lead_w,
    cells_h,
    cells_w,
    heads,
    tiles,
    steps,
    images,
    share,
    scale,
    HEAD_DIM: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: a tile of (query, key) pairs of one head, over one chunk of all cells.

    Pairs are numbered as in a full cell here, so that cells of every shape add up.
    """
    tile = tl.program_id(0) % (tiles * steps)
    head = tl.program_id(0) // (tiles * steps) % heads
    chunk = tl.program_id(0) // (tiles * steps * heads)
    channels = heads * HEAD_DIM
    extent_h = axis_extent(height, window_h, GRID)
    extent_w = axis_extent(width, window_w, GRID)
    extent = extent_h * extent_w
    queries = tile // steps * BLOCK + tl.arange(0, BLOCK)
    keys = tile % steps * STEP + tl.arange(0, STEP)
    query_places = bias_places(queries, extent, extent_w, extent_w)
    key_places = bias_places(keys, extent, extent_w, extent_w)
    shift = load_bias(bias, head, query_places[:, None], key_places[None, :], extent_h, extent_w)
    query_y, query_x = place_of(queries, extent_w)
    key_y, key_x = place_of(keys, extent_w)
    acc = tl.zeros((BLOCK, STEP), tl.float32)
    cells = cells_h * cells_w
    first = chunk * share
    for index in range(first, tl.minimum(first + share, images * cells)):
        image = (index // cells).to(tl.int64)
        cell = index % cells
        first_y, step_y, rows = axis_cell(cell // cells_w, height, window_h, lead_h, GRID)
        first_x, step_x, columns = axis_cell(cell % cells_w, width, window_w, lead_w, GRID)
        query_valid = (query_y < rows) & (query_x < columns)
        key_valid = (key_y < rows) & (key_x < columns)
        query_tokens = tokens_of(queries, extent_w, first_y, step_y, first_x, step_x, width)
        key_tokens = tokens_of(keys, extent_w, first_y, step_y, first_x, step_x, width)
        q_base = qkv + image * height * width * 3 * channels + head * HEAD_DIM
        do_base = grad_out + image * height * width * channels + head * HEAD_DIM
        row_offset = (image * heads + head) * height * width
        q = load_tile(q_base, query_tokens, query_valid, 3 * channels, HEAD_DIM, BLOCK_D)
        k = load_tile(q_base + channels, key_tokens, key_valid, 3 * channels, HEAD_DIM, BLOCK_D)
        v = load_tile(q_base + 2 * channels, key_tokens, key_valid, 3 * channels, HEAD_DIM, BLOCK_D)
        do = load_tile(do_base, query_tokens, query_valid, channels, HEAD_DIM, BLOCK_D)
        row_lse = tl.load(lse + row_offset + query_tokens, mask=query_valid, other=float("inf"))
        row_delta = tl.load(delta + row_offset + query_tokens, mask=query_valid, other=0.0)
        offset = shift - row_lse[:, None] * LOG2_E + nowhere(key_valid)[None, :]
        p, dp = recompute(q, k, do, v, offset, scale)
        acc += p * (dp - row_delta[:, None])
    base = partial + (chunk * heads + head).to(tl.int64) * extent * extent
    pointers = base + queries.to(tl.int64)[:, None] * extent + keys[None, :]
    tl.store(pointers, acc, mask=(queries < extent)[:, None] & (keys < extent)[None, :])


@triton.jit(do_not_specialize=SIZES)
def _window_attention_bias_reduce_kernel(
    pairs,  # (heads, extent, extent) float32
    grad_bias,  # (entries, heads) float32
    height,
    width,
    window_h,
    window_w,
    heads,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: BLOCK entries of one head, each the sum over the pairs so far apart."""
    head = tl.program_id(0) % heads
    entries = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    extent_h = axis_extent(height, window_h, GRID)
    extent_w = axis_extent(width, window_w, GRID)
    extent = extent_h * extent_w
    inside = entries < (2 * extent_h - 1) * (2 * extent_w - 1)
    away_y = entries // (2 * extent_w - 1) - (extent_h - 1)
    away_x = entries % (2 * extent_w - 1) - (extent_w - 1)
    total = tl.zeros((BLOCK, STEP), tl.float32)
    for start in range(0, extent, STEP):
        queries = start + tl.arange(0, STEP)
        y = (queries // extent_w)[None, :] - away_y[:, None]
        x = (queries % extent_w)[None, :] - away_x[:, None]
        valid = inside[:, None] & (queries < extent)[None, :]
        valid = valid & (y >= 0) & (y < extent_h) & (x >= 0) & (x < extent_w)
        rows = (head * extent + queries).to(tl.int64) * extent
        total += tl.load(pairs + rows[None, :] + (y * extent_w + x), mask=valid, other=0.0)
    tl.store(grad_bias + entries * heads + head, tl.sum(total, 1), mask=inside)
