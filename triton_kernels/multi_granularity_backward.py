"""Depthwise convolutions of three sizes and their grouped mix in Triton: the backward pass.

What each branch gets, the mix's weight turned on the gradient that comes, goes to memory, three
maps. Of these one kernel computes x's gradient, convolutions back and the identity, and another the
kernels' gradients; the mix's gradient takes the branches, which a third computes anew. Parameters'
gradients are partial sums, of a number that the shape alone decides, added up afterwards: no
atomics, the same bits on every run.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from kernelpose.triton_kernels.multi_granularity import (
    BLOCK_K,
    OPTIONS,
    SIZES,
    block_outputs,
    block_pixels,
    convolve,
    dot,
    grid,
    layout,
    pack,
    places,
    program,
    rows_columns,
    sizes,
    taps_of,
    tile_pixels,
)
from torch import Tensor

SUM_PIXELS = 8  # of the kernels' gradients: each meets eight neighbours at a time
SUM_PROGRAMS = 1024  # of the sums over all images: they keep a GPU busy


@triton.jit(do_not_specialize=SIZES)
def _multi_granularity_spread_kernel(
    grad_out,
    mix,  # (C, 3 CG), of the maps' type
    through,  # (B, 3) maps
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
    blocks = tl.cdiv(CG, BLOCK_O)
    pixel, block, group, image = program(3 * blocks, groups, pixels, BLOCK_P)
    branch = block // blocks
    source = block % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    grad_out += image * channels * pixels
    through += (image * 3 + branch) * channels * pixels
    mix += group.to(tl.int64) * CG * 3 * CG + branch * CG
    total = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for first in range(0, CG, BLOCK_K):
        output = first + tl.arange(0, BLOCK_K)
        own = output < CG
        place, _ = places(pixel, group * CG + output, pixels, channels, CHANNELS_LAST)
        exists = (pixel < pixels)[:, None] & own[None, :]
        grad = tl.load(grad_out + place, mask=exists, other=0.0)
        exists = own[:, None] & (source < CG)[None, :]
        weight = mix + output[:, None] * (3 * CG) + source[None, :]
        total = dot(grad, tl.load(weight, mask=exists, other=0.0), total)
    place, _ = places(pixel, group * CG + source, pixels, channels, CHANNELS_LAST)
    exists = (pixel < pixels)[:, None] & (source < CG)[None, :]
    tl.store(through + place, total.to(through.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=SIZES)
def _multi_granularity_gradient_kernel(
    grad_out,
    through,  # (B, 3) maps
    packed,  # (C / VECTOR, 86, VECTOR)
    grad_x,
    group_vectors,
    groups,
    height,
    width,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    _, channels, pixels = sizes(group_vectors, groups, height, width, VECTOR)
    pixel, block, _, image = program(tl.cdiv(channels, BLOCK_C), 1, pixels, BLOCK_P)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    own = channel < channels
    map_size = channels.to(tl.int64) * pixels
    place, step = places(pixel, channel, pixels, channels, CHANNELS_LAST)
    row, column = rows_columns(pixel, height, width)
    exists = (pixel < pixels)[:, None] & own[None, :]
    total = tl.load(grad_out + image * map_size + place, mask=exists, other=0.0).to(tl.float32)
    through += image * 3 * map_size
    taps = taps_of(packed, channel, VECTOR)
    for HALF in tl.static_range(3, 0, -1):
        side = 2 * HALF + 1
        for index in range(side * side):  # each tap looks back to where it was looked at from
            dy, dx = HALF - index // side, HALF - index % side
            inside = (row + dy >= 0) & (row + dy < height)
            inside = inside & (column + dx >= 0) & (column + dx < width)
            moved = place + (dy * width + dx) * step
            value = tl.load(through + moved, mask=inside[:, None] & own[None, :], other=0.0)
            weight = tl.load(taps + index * VECTOR, mask=own, other=0.0)[None, :]
            total += value.to(tl.float32) * weight
        taps += side * side * VECTOR
        through += map_size
    tl.store(grad_x + image * map_size + place, total.to(grad_x.dtype.element_ty), mask=exists)


@triton.jit
def _store_taps(partial, total, dy, dx, channel, own, channels, SIDE: tl.constexpr):
    """A row of taps of one branch; total (pixels, dx, channels)."""
    half: tl.constexpr = SIDE // 2
    if (dy >= -half) & (dy <= half):
        row = (dy + half) * SIDE + dx + half
        place = row[:, None].to(tl.int64) * channels + channel[None, :]
        exists = ((dx >= -half) & (dx <= half))[:, None] & own[None, :]
        tl.store(partial + place, tl.sum(total, 0), mask=exists)


@triton.jit(do_not_specialize=[*SIZES, "images", "share"])
def _multi_granularity_taps_kernel(
    x,
    through,  # (B, 3) maps
    partial,  # (parts, 83, C)
    images,
    share,
    group_vectors,
    groups,
    height,
    width,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row of every kernel: a pixel's neighbours in it are an axis of the tiles."""
    _, channels, pixels = sizes(group_vectors, groups, height, width, VECTOR)
    blocks = tl.cdiv(channels, BLOCK_C)
    dy = tl.program_id(0) % 7 - 3
    channel = tl.program_id(0) // 7 % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(0) // (7 * blocks)
    own = channel < channels
    pixels5 = tl.where((dy >= -2) & (dy <= 2), pixels, 0)  # none that this row is not for
    pixels3 = tl.where((dy >= -1) & (dy <= 1), pixels, 0)
    dx = tl.arange(0, 8) - 3  # the last one is too many
    map_size = channels.to(tl.int64) * pixels
    total7 = tl.zeros((BLOCK_P, 8, BLOCK_C), tl.float32)
    total5 = tl.zeros((BLOCK_P, 8, BLOCK_C), tl.float32)
    total3 = tl.zeros((BLOCK_P, 8, BLOCK_C), tl.float32)
    tiles = tl.cdiv(pixels, BLOCK_P)
    for tile in range(part * share, tl.minimum((part + 1) * share, images * tiles)):
        image = (tile // tiles).to(tl.int64)
        pixel = tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        place, step = places(pixel, channel, pixels, channels, CHANNELS_LAST)
        row = pixel // width + dy
        column = (pixel % width)[:, None] + dx[None, :]
        inside = ((pixel < pixels) & (row >= 0) & (row < height))[:, None]
        inside = inside & (column >= 0) & (column < width)
        moved = place[:, None, :] + ((dy * width + dx) * step)[None, :, None]
        exists = inside[:, :, None] & own[None, None, :]
        value = tl.load(x + image * map_size + moved, mask=exists, other=0.0).to(tl.float32)
        # Each neighbour reads the gradients itself: handing them around would take barriers.
        grads = through + image * 3 * map_size + tl.broadcast_to(place[:, None, :], total7.shape)
        exists = (pixel < pixels)[:, None, None] & own[None, None, :]
        total7 += value * tl.load(grads, mask=exists, other=0.0).to(tl.float32)
        exists = (pixel < pixels5)[:, None, None] & own[None, None, :]
        total5 += value * tl.load(grads + map_size, mask=exists, other=0.0).to(tl.float32)
        exists = (pixel < pixels3)[:, None, None] & own[None, None, :]
        total3 += value * tl.load(grads + 2 * map_size, mask=exists, other=0.0).to(tl.float32)
    row_size = channels.to(tl.int64)
    partial += part * 83 * row_size
    _store_taps(partial, total7, dy, dx, channel, own, channels, 7)
    _store_taps(partial + 49 * row_size, total5, dy, dx, channel, own, channels, 5)
    _store_taps(partial + 74 * row_size, total3, dy, dx, channel, own, channels, 3)


@triton.jit(do_not_specialize=[*SIZES, "images", "share"])
def _multi_granularity_mix_kernel(
    grad_out,
    x,
    packed,  # (C / VECTOR, 86, VECTOR)
    partial,  # (parts, C, 3 CG)
    images,
    share,
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
    index = tl.program_id(0)
    source = index % tl.cdiv(CG, BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    index //= tl.cdiv(CG, BLOCK_K)
    output = index % tl.cdiv(CG, BLOCK_O) * BLOCK_O + tl.arange(0, BLOCK_O)
    index //= tl.cdiv(CG, BLOCK_O)
    group = index % groups
    part = index // groups
    own = source < CG
    total7 = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    total5 = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    total3 = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    tiles = tl.cdiv(pixels, BLOCK_P)
    for tile in range(part * share, tl.minimum((part + 1) * share, images * tiles)):
        start = (tile // tiles).to(tl.int64) * channels * pixels
        pixel = tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        branch7, branch5, branch3 = convolve(
            *(x + start, packed, pixel, group * CG + source, own, channels, height, width),
            VECTOR,
            CHANNELS_LAST,
        )
        place, _ = places(pixel, group * CG + output, pixels, channels, CHANNELS_LAST)
        exists = (pixel < pixels)[:, None] & (output < CG)[None, :]
        grad = tl.trans(tl.load(grad_out + start + place, mask=exists, other=0.0))
        total7 = dot(grad, branch7.to(grad.dtype), total7)
        total5 = dot(grad, branch5.to(grad.dtype), total5)
        total3 = dot(grad, branch3.to(grad.dtype), total3)
    partial += (part.to(tl.int64) * groups + group) * CG * 3 * CG
    place = output[:, None] * (3 * CG) + source[None, :]
    exists = (output < CG)[:, None] & own[None, :]
    tl.store(partial + place, total7, mask=exists)
    tl.store(partial + CG + place, total5, mask=exists)
    tl.store(partial + 2 * CG + place, total3, mask=exists)


def block_channels(x: Tensor) -> int:
    """Channels of a program where groups do not matter: fewer where pixels are neighbours."""
    return 16 if x.is_contiguous() else 32


def mix_pixels(x: Tensor) -> int:
    """Pixels of a tile of the mix's gradient, whose three sums fill the registers."""
    return 64 if x.element_size() == 2 and not x.is_contiguous() else tile_pixels(x) // 2


def _shares(steps: int, blocks: int) -> tuple[int, int]:
    """(parts, steps of each) that sums over so many steps, in so many blocks, are cut into."""
    share = triton.cdiv(steps, max(1, SUM_PROGRAMS // blocks))
    return triton.cdiv(steps, share), share


def backward(
    grad_out: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    grad_x: Tensor,
    gradients: Sequence[Tensor],
    groups: int,
) -> None:
    """Fill grad_x and the gradients of the parameters; the maps lie alike, else as in `forward`."""
    batch, channels, height, width = x.shape
    group, of_maps = channels // groups, layout(x, groups)
    block_o, mix_weight = block_outputs(group), parameters[6]
    block_c, of_mix = block_channels(x), {"BLOCK_O": block_o, "BLOCK_K": BLOCK_K}
    with torch.cuda.device_of(x):
        packed = pack(parameters[:3], parameters[3:6], of_maps["VECTOR"])
        through = x.new_empty(3 * x.numel())
        blocks = 3 * groups * triton.cdiv(group, block_o)
        block_p = block_pixels(x, blocks)
        _multi_granularity_spread_kernel[grid(x, block_p, blocks)](
            *(grad_out, mix_weight.to(x.dtype), through),
            **(of_maps | of_mix | OPTIONS),
            BLOCK_P=block_p,
        )
        blocks = triton.cdiv(channels, block_c)
        block_p = block_pixels(x, blocks)
        _multi_granularity_gradient_kernel[grid(x, block_p, blocks)](
            *(grad_out, through, packed, grad_x),
            **(of_maps | OPTIONS),
            BLOCK_P=block_p,
            BLOCK_C=block_c,
        )
        parts, share = _shares(batch * triton.cdiv(height * width, SUM_PIXELS), 7 * blocks)
        partial = packed.new_empty(parts, 83, channels)
        _multi_granularity_taps_kernel[(parts * 7 * blocks,)](
            *(x, through, partial, batch, share),
            **(of_maps | OPTIONS),
            BLOCK_P=SUM_PIXELS,
            BLOCK_C=block_c,
        )
        of_taps = partial.sum(0).t().split((49, 25, 9), 1)
        for gradient, of_branch in zip(gradients[:3], of_taps, strict=True):
            gradient.copy_(of_branch.reshape(gradient.shape))
        blocks = groups * triton.cdiv(group, BLOCK_K) * triton.cdiv(group, block_o)
        block_p = mix_pixels(x)
        parts, share = _shares(batch * triton.cdiv(height * width, block_p), blocks)
        partial = packed.new_empty(parts, channels, 3 * group)
        _multi_granularity_mix_kernel[(parts * blocks,)](
            *(grad_out, x, packed, partial, batch, share),
            **(of_maps | of_mix | OPTIONS),
            BLOCK_P=block_p,
        )
        torch.sum(partial, 0, out=gradients[6].view(partial.shape[1:]))
        # A branch's bias gets what its channel's results get, summed over the pixels.
        torch.sum(grad_out, (0, 2, 3), dtype=packed.dtype, out=gradients[7])
        mixed = mix_weight.view(groups, group, 3, group) * gradients[7].view(groups, group, 1, 1)
        for gradient, of_branch in zip(gradients[3:6], mixed.sum(1).unbind(1), strict=True):
            gradient.copy_(of_branch.flatten())
