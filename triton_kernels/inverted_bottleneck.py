"""Two 1x1 convolutions and what lies between in Triton, as one launch.

What is computed: `kernelpose/reference/inverted_bottleneck.py`. A program makes a tile of output
pixels. CHUNK hidden channels at a time are made of the tile and a pixel around it, gathered through
shared memory for the nine taps, and multiplied into the sums of BLOCK_O outputs; the x that a
program reads again for each chunk comes from the caches. Without a depthwise convolution a tile is
of neighbours in a row of all pixels of an image. Outputs beyond BLOCK_O make the hidden channels
anew. No atomics: the same bits on every run.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cells import LOG2_E, dot

SIZES = ["height", "width", "out_height", "out_width"]


class Tile(NamedTuple):
    """What a program makes at once, and its budget, whatever the options of the kernel."""

    rows: int  # of output pixels
    columns: int
    chunk: int  # hidden channels
    step: int  # input channels
    warps: int
    registers: int  # a thread at most: told to ptxas, which else may spill for more blocks
    shared: int  # bytes a block


# (element size, stride; 0 without a depthwise convolution) -> tile. With the pixels around it a
# tile is of 128, or 64, pixels at most. Chosen by what compiles without spilling registers on sm_80
# and sm_90; nothing here was timed on a GPU yet.
TILES = {
    (2, 0): Tile(1, 64, 32, 32, 4, 255, 24576),
    (2, 1): Tile(8, 8, 32, 32, 8, 255, 24576),
    (2, 2): Tile(4, 6, 32, 32, 8, 255, 24576),
    (4, 0): Tile(1, 32, 16, 16, 4, 255, 16384),
    (4, 1): Tile(4, 8, 16, 16, 8, 255, 16384),
    (4, 2): Tile(3, 4, 16, 16, 8, 255, 16384),
}
MOST_OUTPUTS = 128


@triton.jit
def _activate(z, ACT: tl.constexpr):
    if ACT == "relu":
        return tl.where(z <= 0.0, 0.0, z)  # keeps NaN
    if ACT == "silu":
        return z / (1.0 + tl.exp2(z * -LOG2_E))
    return z


@triton.jit
def _expand(
    x, places, exists, weight, bias, channel, C: tl.constexpr, HIDDEN: tl.constexpr,
    ACT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Hidden channels `channel` of pixels `places`, zeros where these do not exist."""
    known = channel < HIDDEN
    inner = tl.arange(0, STEP)
    z = tl.zeros((places.shape[0], channel.shape[0]), tl.float32)
    for start in range(0, C, STEP):
        own = start + inner < C
        pixels = tl.load(
            x + places[:, None] * C + (start + inner)[None, :],
            mask=exists[:, None] & own[None, :],
            other=0.0,
        )
        weights = tl.load(
            weight + channel[:, None] * C + (start + inner)[None, :],
            mask=known[:, None] & own[None, :],
            other=0.0,
        )
        z += dot(pixels, tl.trans(weights))
    z += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    return tl.where(exists[:, None] & known[None, :], _activate(z, ACT), 0.0)


@triton.jit(do_not_specialize=SIZES)
def _inverted_bottleneck_kernel(
    x,  # (images, height, width, C)
    expand,  # (HIDDEN, C)
    expand_bias,
    depthwise,  # (HIDDEN, 9), or None: an image is then one row
    depthwise_bias,
    project,  # (OUTPUTS, HIDDEN)
    project_bias,
    out,  # (images, out_height, out_width, OUTPUTS)
    height,
    width,
    out_height,
    out_width,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STRIDE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACT1: tl.constexpr,
    ACT2: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # output pixels, rounded up to a power of two
    BLOCK_H: tl.constexpr,  # with the pixels around them
    BLOCK_O: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    AROUND: tl.constexpr = (COLUMNS - 1) * STRIDE + 3
    element = x.dtype.element_ty
    across, down = tl.cdiv(out_width, COLUMNS), tl.cdiv(out_height, ROWS)
    tile = tl.program_id(0) // tl.cdiv(OUTPUTS, BLOCK_O)
    image = (tile // (across * down)).to(tl.int64)
    top, left = tile // across % down * ROWS, tile % across * COLUMNS
    x += image * height * width * C
    out += image * out_height * out_width * OUTPUTS
    pixel = tl.arange(0, BLOCK_M)
    row, column = top + pixel // COLUMNS, left + pixel % COLUMNS
    own = (pixel < ROWS * COLUMNS) & (row < out_height) & (column < out_width)
    to = row * out_width + column
    near = tl.arange(0, BLOCK_H)
    if depthwise is None:
        places, exists = to, own
    else:
        y, side = top * STRIDE - 1 + near // AROUND, left * STRIDE - 1 + near % AROUND
        places = y * width + side
        exists = (y >= 0) & (y < height) & (side >= 0) & (side < width)
        first = pixel // COLUMNS * STRIDE * AROUND + pixel % COLUMNS * STRIDE
        first = tl.where(pixel < ROWS * COLUMNS, first, 0)
    output = tl.program_id(0) % tl.cdiv(OUTPUTS, BLOCK_O) * BLOCK_O + tl.arange(0, BLOCK_O)
    wanted = output < OUTPUTS
    sums = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for start in range(0, HIDDEN, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        known = channel < HIDDEN
        z = _expand(x, places, exists, expand, expand_bias, channel, C, HIDDEN, ACT1, STEP)
        if depthwise is not None:
            hidden = z.to(element)
            z = tl.zeros((BLOCK_M, CHUNK), tl.float32)
            z += tl.load(depthwise_bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
            for tap in range(9):
                index = (first + tap // 3 * AROUND + tap % 3)[:, None]
                index = tl.broadcast_to(index, (BLOCK_M, CHUNK))
                weight = tl.load(depthwise + channel * 9 + tap, mask=known, other=0.0)
                z += tl.gather(hidden, index, 0).to(tl.float32) * weight.to(tl.float32)[None, :]
            z = tl.where(known[None, :], _activate(z, ACT2), 0.0)
        weights = tl.load(
            project + output[:, None] * HIDDEN + channel[None, :],
            mask=wanted[:, None] & known[None, :],
            other=0.0,
        )
        sums += dot(z.to(element), tl.trans(weights))
    sums += tl.load(project_bias + output, mask=wanted, other=0.0).to(tl.float32)[None, :]
    inside = own[:, None] & wanted[None, :]
    places = to[:, None] * OUTPUTS + output[None, :]
    if RESIDUAL:
        sums += tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, sums.to(element), mask=inside)


def constants(
    shape: tuple[int, int, int], element_size: int, stride: int
) -> tuple[Tile, dict[str, Any]]:
    """What a kernel for (C, hidden, outputs) is compiled with; stride 0: no depthwise one."""
    tile = TILES[element_size, stride]
    stride = max(stride, 1)
    around = [(side - 1) * stride + 3 for side in (tile.rows, tile.columns)]
    pixels = triton.next_power_of_2(tile.rows * tile.columns)
    outputs = min(MOST_OUTPUTS, max(16, triton.next_power_of_2(shape[2])))
    return tile, {
        **dict(zip(("C", "HIDDEN", "OUTPUTS"), shape, strict=True)),
        "STRIDE": stride,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "BLOCK_M": max(16, pixels),
        "BLOCK_H": triton.next_power_of_2(around[0] * around[1]),
        "BLOCK_O": outputs,
        "CHUNK": tile.chunk,
        "STEP": tile.step,
    }


def options(tile: Tile) -> dict[str, Any]:
    """What Triton compiles a kernel with."""
    return {"num_warps": tile.warps, "num_stages": 2, "maxnreg": tile.registers}


def forward(
    x: Tensor,
    weights: list[Tensor | None],
    out: Tensor,
    stride: int,
    residual: bool,
    activations: tuple[str, str],
) -> None:
    """Fill out (B, h, w, outputs) from x (B, H, W, C); weights: of expand, depthwise and project,
    each with its bias. All are dense, and none is empty."""
    expand, _, depthwise, _, project, _ = weights
    assert expand is not None and project is not None
    shape = (x.shape[3], expand.shape[0], project.shape[0])
    tile, sizes = constants(shape, x.element_size(), 0 if depthwise is None else stride)
    size, out_size = tuple(x.shape[1:3]), tuple(out.shape[1:3])
    if depthwise is None:
        size = out_size = (1, size[0] * size[1])
    tiles = triton.cdiv(out_size[0], sizes["ROWS"]) * triton.cdiv(out_size[1], sizes["COLUMNS"])
    parts = triton.cdiv(shape[2], sizes["BLOCK_O"])
    with torch.cuda.device_of(x):
        _inverted_bottleneck_kernel[(x.shape[0] * tiles * parts,)](
            x,
            *weights,
            out,
            *size,
            *out_size,
            RESIDUAL=residual,
            ACT1=activations[0],
            ACT2=activations[1],
            **sizes,
            **options(tile),
        )
