"""Weighted squared error against Gaussian targets in Triton, forward and backward.

What is computed: `kernelpose/reference/heatmap_loss.py`. One program takes the map of one joint, in
tiles of rows and columns; the target of a tile is the product of two short vectors, and the map of
a joint of weight 0 is not read. Windows are decided in the reference's order of operations, with
divisions rounded as IEEE says: which pixels count must not depend on the backend. Every sum has one
order: no atomics, the same bits on every run.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

UDP = tl.constexpr(0)
UNBIASED = tl.constexpr(2)

TILE = 2048  # elements of a map at a time
MAX_COLUMNS = 128  # of a tile
SUM_BLOCK = 1024
WARPS = 8
REGISTERS = 64  # a thread at most, on either architecture
SIZES = ["height", "row_vectors", "count"]


@triton.jit
def _trunc(x):
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def _axis(place, ratio, size, radius, half, CODEC: tl.constexpr):
    """A joint on one axis: first pixel and end of its window, origin and shift of its Gaussian, and
    whether the window touches the map."""
    center = tl.div_rn(place, ratio)
    zero = size * 0.0
    if CODEC == UNBIASED:
        reached = (center - radius < size) & (center + radius + 1.0 >= 0.0)
        return zero, size, zero, center, reached
    nearest = _trunc(center + 0.5)
    first = _trunc(nearest - radius)
    end = _trunc(nearest + radius + 1.0)
    shift = center - nearest if CODEC == UDP else zero
    return first, end, first + half, shift, (first < size) & (end >= 0.0)


@triton.jit
def _profile(pixels, first, end, origin, shift, exponent):
    at = pixels.to(tl.float32)
    offset = (at - origin) - shift
    return tl.where((at >= first) & (at < end), tl.exp2(exponent * offset * offset), 0.0)


@triton.jit
def _joint(
    keypoints, visible, joint, height, width, ratio_x, ratio_y, radius, half, CODEC: tl.constexpr
):
    """Both axes and the weight of a joint; the windows of one that is not drawn are empty."""
    x = tl.load(keypoints + 2 * joint)
    y = tl.load(keypoints + 2 * joint + 1)
    weight = tl.load(visible + joint)
    first_x, end_x, origin_x, shift_x, reached_x = _axis(
        x, ratio_x, width.to(tl.float32), radius, half, CODEC
    )
    first_y, end_y, origin_y, shift_y, reached_y = _axis(
        y, ratio_y, height.to(tl.float32), radius, half, CODEC
    )
    reached = reached_x & reached_y
    labelled = weight >= 0.5
    drawn = reached & labelled
    end_x = tl.where(drawn, end_x, first_x)
    end_y = tl.where(drawn, end_y, first_y)
    weight = tl.where(labelled & (reached == 0), weight * 0.0, weight)
    return first_x, end_x, origin_x, shift_x, first_y, end_y, origin_y, shift_y, weight


@triton.jit(do_not_specialize=SIZES)
def _heatmap_loss_forward_kernel(
    pred,  # (maps, height, width)
    keypoints,  # (maps, 2) float32
    visible,  # (maps,) float32
    sums,  # (maps,) float32: weight times the sum of squares
    height,
    ratio_x,
    ratio_y,
    radius,
    half,
    exponent,
    row_vectors,
    CODEC: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program: the map of one joint, in rows of row_vectors * VECTOR elements."""
    width = row_vectors * VECTOR
    joint = tl.program_id(0).to(tl.int64)
    first_x, end_x, origin_x, shift_x, first_y, end_y, origin_y, shift_y, weight = _joint(
        keypoints, visible, joint, height, width, ratio_x, ratio_y, radius, half, CODEC
    )
    total = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    if weight != 0.0:
        base = pred + joint * height * width
        for top in range(0, height, BLOCK_H):
            y = top + tl.arange(0, BLOCK_H)
            rows = _profile(y, first_y, end_y, origin_y, shift_y, exponent)
            for left in range(0, width, BLOCK_W):
                x = left + tl.arange(0, BLOCK_W)
                columns = _profile(x, first_x, end_x, origin_x, shift_x, exponent)
                inside = (y < height)[:, None] & (x < width)[None, :]
                tile = tl.load(base + y[:, None] * width + x[None, :], mask=inside, other=0.0)
                difference = tile.to(tl.float32) - rows[:, None] * columns[None, :]
                total += tl.where(inside, difference * difference, 0.0)
    tl.store(sums + joint, weight * tl.sum(tl.sum(total, 1), 0))


@triton.jit(do_not_specialize=SIZES)
def _heatmap_loss_sum_kernel(sums, loss, count, factor, BLOCK: tl.constexpr):
    """One program: loss = factor * the sum of `count` numbers."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(sums + i, mask=i < count, other=0.0)
    tl.store(loss, factor * tl.sum(total, 0))


@triton.jit(do_not_specialize=SIZES)
def _heatmap_loss_backward_kernel(
    grad_loss,  # one number, float32
    pred,  # (maps, height, width)
    keypoints,  # (maps, 2) float32
    visible,  # (maps,) float32
    grad_pred,  # (maps, height, width)
    height,
    factor,  # 2 / the elements of pred
    ratio_x,
    ratio_y,
    radius,
    half,
    exponent,
    row_vectors,
    CODEC: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program: the map of one joint, in rows of row_vectors * VECTOR elements."""
    width = row_vectors * VECTOR
    joint = tl.program_id(0).to(tl.int64)
    first_x, end_x, origin_x, shift_x, first_y, end_y, origin_y, shift_y, weight = _joint(
        keypoints, visible, joint, height, width, ratio_x, ratio_y, radius, half, CODEC
    )
    scale = tl.where(weight != 0.0, factor * tl.load(grad_loss) * weight, 0.0)
    readable = tl.where(weight != 0.0, height, 0)
    for top in range(0, height, BLOCK_H):
        y = top + tl.arange(0, BLOCK_H)
        rows = _profile(y, first_y, end_y, origin_y, shift_y, exponent)
        for left in range(0, width, BLOCK_W):
            x = left + tl.arange(0, BLOCK_W)
            columns = _profile(x, first_x, end_x, origin_x, shift_x, exponent)
            inside = (y < height)[:, None] & (x < width)[None, :]
            places = joint * height * width + y[:, None] * width + x[None, :]
            read = (y < readable)[:, None] & (x < width)[None, :]
            tile = tl.load(pred + places, mask=read, other=0.0).to(tl.float32)
            gradient = scale * (tile - rows[:, None] * columns[None, :])
            tl.store(grad_pred + places, gradient.to(grad_pred.dtype.element_ty), mask=inside)


def tile(height: int, width: int, element_size: int) -> dict[str, int]:
    """The elements of a load, 16 bytes where rows are made of such; rows and columns of a tile."""
    vector = math.gcd(width, 16 // element_size)
    columns = min(triton.next_power_of_2(width), MAX_COLUMNS)
    return {
        "row_vectors": width // vector,
        "VECTOR": vector,
        "BLOCK_H": min(triton.next_power_of_2(height), TILE // columns),
        "BLOCK_W": columns,
    }


def _gaussian(sigma: float) -> tuple[float, float, float]:
    """(radius, half, exponent) of the kernels."""
    radius = 3 * sigma
    return radius, math.floor((2 * radius + 1) / 2), -math.log2(math.e) / (2 * sigma**2)


def forward(
    pred: Tensor,
    keypoints: Tensor,
    visible: Tensor,
    ratio_x: float,
    ratio_y: float,
    sigma: float,
    codec: int,
) -> Tensor:
    """The loss, one float32 number, of pred (B, K, h, w) with elements, contiguous; keypoints
    (B, K, 2) and visible (B, K) are float32. codec: its place among TARGET_CODECS."""
    height, width = pred.shape[2:]
    sums = torch.empty_like(visible)
    loss = visible.new_empty(())
    with torch.cuda.device_of(pred):
        _heatmap_loss_forward_kernel[(visible.numel(),)](
            pred,
            keypoints,
            visible,
            sums,
            height,
            ratio_x,
            ratio_y,
            *_gaussian(sigma),
            CODEC=codec,
            num_warps=WARPS,
            **tile(height, width, pred.element_size()),
        )
        _heatmap_loss_sum_kernel[(1,)](
            sums, loss, visible.numel(), 1 / pred.numel(), BLOCK=SUM_BLOCK, num_warps=WARPS
        )
    return loss


def backward(
    grad_loss: Tensor,
    pred: Tensor,
    keypoints: Tensor,
    visible: Tensor,
    ratio_x: float,
    ratio_y: float,
    sigma: float,
    codec: int,
) -> Tensor:
    """The gradient of pred; grad_loss is one float32 number, the rest as in `forward`."""
    height, width = pred.shape[2:]
    grad_pred = torch.empty_like(pred)
    with torch.cuda.device_of(pred):
        _heatmap_loss_backward_kernel[(visible.numel(),)](
            grad_loss,
            pred,
            keypoints,
            visible,
            grad_pred,
            height,
            2 / pred.numel(),
            ratio_x,
            ratio_y,
            *_gaussian(sigma),
            CODEC=codec,
            num_warps=WARPS,
            **tile(height, width, pred.element_size()),
        )
    return grad_pred
