"""Depthwise convolutions of three sizes and their grouped mix in Triton: the forward pass, and what
both directions use.

What is computed: `kernelpose/reference/multi_granularity.py`. A program takes some pixels of one
image and the channels of one group, BLOCK_K after BLOCK_K: of these it reads what lies under each
tap, through the L1 cache, for all three convolutions at once, and their results, which stay in
registers, go through a matrix product into the mix. So a group may have any number of channels.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"num_warps": 4, "num_stages": 1}
# Of any kernel, on either architecture.
REGISTERS = 240  # a thread at most; 176 where channels are neighbours
SHARED = 20480  # bytes a program at most
BLOCK_K = 16  # channels that are convolved at a time: what a matrix product takes
PROGRAMS = 256  # that a GPU wants at least; tiles of pixels are smaller where there are fewer
SIZES = ["group_vectors", "groups", "height", "width"]


@triton.jit
def sizes(group_vectors, groups, height, width, VECTOR: tl.constexpr):
    """(channels of a group, channels, pixels): the compiler sees what divides the first two."""
    group_channels = group_vectors * VECTOR
    return group_channels, groups * group_channels, height * width


@triton.jit
def program(blocks, groups, pixels, BLOCK_P: tl.constexpr):
    """(pixels, block of channels, group, image) of this program."""
    tiles = tl.cdiv(pixels, BLOCK_P)
    index = tl.program_id(0)
    pixel = index % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    index //= tiles
    block = index % blocks
    index //= blocks
    return pixel, block, index % groups, (index // groups).to(tl.int64)


@triton.jit
def places(pixel, channel, pixels, channels, CHANNELS_LAST: tl.constexpr):
    """(where pixels of channels lie in an image, how far from it the next pixel does)."""
    if CHANNELS_LAST:
        return pixel[:, None] * channels + channel[None, :], channels
    return channel[None, :] * pixels + pixel[:, None], 1


@triton.jit
def rows_columns(pixel, height, width):
    """Where pixels are; those past the end of an image are out of reach below it."""
    return tl.where(pixel < height * width, pixel // width, height + 3), pixel % width


@triton.jit
def taps_of(packed, channel, VECTOR: tl.constexpr):
    """Pointers to the first of the 86 packed numbers of some channels; see `pack`."""
    return packed + (channel // VECTOR).to(tl.int64) * (86 * VECTOR) + channel % VECTOR


@triton.jit
def convolve(
    x,
    packed,
    pixel,
    channel,
    own,
    channels,
    height,
    width,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Tiles of the three depthwise convolutions of an image."""
    place, step = places(pixel, channel, height * width, channels, CHANNELS_LAST)
    row, column = rows_columns(pixel, height, width)
    taps = taps_of(packed, channel, VECTOR)
    start = tl.zeros(place.shape, tl.float32)
    branch7 = start + tl.load(taps + 83 * VECTOR, mask=own, other=0.0)[None, :]
    branch5 = start + tl.load(taps + 84 * VECTOR, mask=own, other=0.0)[None, :]
    branch3 = start + tl.load(taps + 85 * VECTOR, mask=own, other=0.0)[None, :]
    for index in range(49):
        dy, dx = index // 7 - 3, index % 7 - 3
        inside = (row + dy >= 0) & (row + dy < height) & (column + dx >= 0) & (column + dx < width)
        exists = inside[:, None] & own[None, :]
        moved = place + (dy * width + dx) * step
        under = tl.load(x + moved, mask=exists, other=0.0).to(tl.float32)
        branch7 += under * tl.load(taps + index * VECTOR, mask=own, other=0.0)[None, :]
        if (dy >= -2) & (dy <= 2) & (dx >= -2) & (dx <= 2):
            of_five = taps + (61 + dy * 5 + dx) * VECTOR
            branch5 += under * tl.load(of_five, mask=own, other=0.0)[None, :]
        if (dy >= -1) & (dy <= 1) & (dx >= -1) & (dx <= 1):
            of_three = taps + (78 + dy * 3 + dx) * VECTOR
            branch3 += under * tl.load(of_three, mask=own, other=0.0)[None, :]
    return branch7, branch5, branch3


@triton.jit
def dot(a, b, total):
    """Plus the product in the maps' type: to float32's precision where that is float32."""
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def _mix(branch, mix, source, output, group_channels, mixed, total):
    """Plus what some channels of a branch put into some results; mix: their group's, (CG, 3 CG)."""
    exists = (source < group_channels)[:, None] & (output < group_channels)[None, :]
    weight = tl.load(mix + output[None, :] * mixed + source[:, None], mask=exists, other=0.0)
    return dot(branch.to(weight.dtype), weight, total)


@triton.jit(do_not_specialize=SIZES)
def _multi_granularity_kernel(
    x,
    packed,  # (C / VECTOR, 86, VECTOR)
    mix,  # (C, 3 CG), of x's type
    mix_bias,
    out,
    group_vectors,
    groups,
    height,
    width,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    CG, channels, pixels = sizes(group_vectors, groups, height, width, VECTOR)
    pixel, block, group, image = program(tl.cdiv(CG, BLOCK_O), groups, pixels, BLOCK_P)
    output = block * BLOCK_O + tl.arange(0, BLOCK_O)
    x += image * channels * pixels
    out += image * channels * pixels
    mix += group.to(tl.int64) * CG * 3 * CG
    total = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for first in range(0, CG, BLOCK_K):
        source = first + tl.arange(0, BLOCK_K)
        own = source < CG
        branch7, branch5, branch3 = convolve(
            *(x, packed, pixel, group * CG + source, own, channels, height, width),
            VECTOR,
            CHANNELS_LAST,
        )
        total = _mix(branch7, mix, source, output, CG, 3 * CG, total)
        total = _mix(branch5, mix + CG, source, output, CG, 3 * CG, total)
        total = _mix(branch3, mix + 2 * CG, source, output, CG, 3 * CG, total)
    channel = group * CG + output
    place, _ = places(pixel, channel, pixels, channels, CHANNELS_LAST)
    exists = (pixel < pixels)[:, None] & (output < CG)[None, :]
    total += tl.load(mix_bias + channel, mask=output < CG, other=0.0)[None, :]
    total += tl.load(x + place, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=exists)


def layout(x: Tensor, groups: int) -> dict[str, Any]:
    """The arguments that say how maps (B, C, H, W), dense, lie."""
    group = x.shape[1] // groups
    vector = math.gcd(group, 16 // x.element_size())
    return {
        "group_vectors": group // vector,
        "groups": groups,
        "height": x.shape[2],
        "width": x.shape[3],
        "VECTOR": vector,
        "CHANNELS_LAST": not x.is_contiguous(),
    }


def block_outputs(group: int) -> int:
    """Channels of a group that a program computes: all, as a rule."""
    return min(max(16, triton.next_power_of_2(group)), 128)


def tile_pixels(x: Tensor) -> int:
    """Pixels of a tile: half of what half types take where products take three in float32."""
    return 128 // x.element_size()


def block_pixels(x: Tensor, blocks: int) -> int:
    """Pixels of a program, where a tile of them is computed in so many blocks of channels."""
    tiles = x.shape[0] * triton.cdiv(x.shape[2] * x.shape[3], tile_pixels(x))
    return tile_pixels(x) if tiles * blocks >= PROGRAMS else 16


def pack(weights: Sequence[Tensor], biases: Sequence[Tensor], vector: int) -> Tensor:
    """(C / vector, 86, vector): the taps of 7x7, 5x5 and 3x3, then the biases."""
    rows = [*(weight.flatten(1) for weight in weights), *(bias.unsqueeze(1) for bias in biases)]
    return torch.cat(rows, 1).unflatten(0, (-1, vector)).transpose(1, 2).contiguous()


def grid(x: Tensor, block_p: int, blocks: int) -> tuple[int]:
    return (x.shape[0] * triton.cdiv(x.shape[2] * x.shape[3], block_p) * blocks,)


def forward(x: Tensor, parameters: Sequence[Tensor], out: Tensor, groups: int) -> None:
    """Fill out; x and out (B, C, H, W) are dense and lie alike, not empty. parameters: those of the
    op in its order, float32 and dense."""
    mix_weight, mix_bias = parameters[6:]
    group, of_maps = x.shape[1] // groups, layout(x, groups)
    block_o = block_outputs(group)
    blocks = groups * triton.cdiv(group, block_o)
    block_p = block_pixels(x, blocks)
    with torch.cuda.device_of(x):
        packed = pack(parameters[:3], parameters[3:6], of_maps["VECTOR"])
        _multi_granularity_kernel[grid(x, block_p, blocks)](
            *(x, packed, mix_weight.to(x.dtype), mix_bias, out),
            **of_maps,
            BLOCK_P=block_p,
            BLOCK_O=block_o,
            BLOCK_K=BLOCK_K,
            **OPTIONS,
        )
