"""The sum of a channel gate and a spatial gate in Triton, forward and backward.

What is computed: `kernelpose/reference/dual_gate.py`. An image is a table, whose rows are pixels in
channels_last and channels in contiguous: one kernel reduces rows and columns together, another
applies the gates. Between them lie a few numbers a channel and a pixel, which plain PyTorch
handles. Every sum has one order: no atomics, the same bits on every run.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from kernelpose.triton_kernels import maps
from torch import Tensor

OPTIONS = {"num_warps": 8}
REGISTERS = 128  # a thread at most, on either architecture
BLOCKS = {"BLOCK_R": 32, "BLOCK_C": 64}
KERNEL, TAPS = 7, 49
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _rows_of_program(rows, BLOCK_R: tl.constexpr):
    """(image, block of rows in it, its rows) of this program."""
    blocks = tl.cdiv(rows, BLOCK_R)
    block = tl.program_id(0) % blocks
    return (tl.program_id(0) // blocks).to(tl.int64), block, block * BLOCK_R + tl.arange(0, BLOCK_R)


@triton.jit(do_not_specialize=maps.SIZES)
def _dual_gate_peaks_kernel(
    y,
    of_rows,  # (2, B, rows): sums, largest
    of_columns,  # (2, B, blocks, columns): of this program's rows
    batch,
    row_vectors,
    rows,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = row_vectors * VECTOR
    image, block, row = _rows_of_program(rows, BLOCK_R)
    own = row < rows
    blocks = tl.cdiv(rows, BLOCK_R)
    to = of_columns + (image * blocks + block) * columns
    total = tl.zeros((BLOCK_R,), tl.float32)
    largest = tl.full((BLOCK_R,), -INFINITY, tl.float32)
    for first in range(0, columns, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        exists = column < columns
        inside = own[:, None] & exists[None, :]
        values = maps.load(
            y + image * rows * columns, row[:, None] * columns + column[None, :], inside
        )
        bounded = tl.where(inside, values, -INFINITY)
        total += tl.sum(values, 1)
        largest = tl.maximum(largest, tl.max(bounded, 1))
        tl.store(to + column, tl.sum(values, 0), mask=exists)
        tl.store(to + batch * blocks * columns + column, tl.max(bounded, 0), mask=exists)
    tl.store(of_rows + image * rows + row, total, mask=own)
    tl.store(of_rows + (batch + image) * rows + row, largest, mask=own)


@triton.jit(do_not_specialize=maps.SIZES)
def _dual_gate_shares_kernel(
    grad_out,
    y,
    row_largest,  # (B, rows)
    column_largest,  # (B, columns)
    of_rows,  # (2, B, rows): sums of grad_out y, how many are the largest
    of_columns,  # (2, B, blocks, columns)
    batch,
    row_vectors,
    rows,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = row_vectors * VECTOR
    image, block, row = _rows_of_program(rows, BLOCK_R)
    own = row < rows
    blocks = tl.cdiv(rows, BLOCK_R)
    to = of_columns + (image * blocks + block) * columns
    of_row = tl.load(row_largest + image * rows + row, mask=own, other=0.0)
    total = tl.zeros((BLOCK_R,), tl.float32)
    count = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, columns, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        exists = column < columns
        inside = own[:, None] & exists[None, :]
        places = row[:, None] * columns + column[None, :]
        values = maps.load(y + image * rows * columns, places, inside)
        products = values * maps.load(grad_out + image * rows * columns, places, inside)
        of_column = tl.load(column_largest + image * columns + column, mask=exists, other=0.0)
        row_shares = tl.where(inside & (values == of_row[:, None]), 1.0, 0.0)
        column_shares = tl.where(inside & (values == of_column[None, :]), 1.0, 0.0)
        total += tl.sum(products, 1)
        count += tl.sum(row_shares, 1)
        tl.store(to + column, tl.sum(products, 0), mask=exists)
        tl.store(to + batch * blocks * columns + column, tl.sum(column_shares, 0), mask=exists)
    tl.store(of_rows + image * rows + row, total, mask=own)
    tl.store(of_rows + (batch + image) * rows + row, count, mask=own)


@triton.jit(do_not_specialize=maps.SIZES)
def _dual_gate_output_kernel(
    y,
    row_gates,  # (B, rows)
    column_gates,  # (B, columns)
    out,
    row_vectors,
    rows,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = row_vectors * VECTOR
    image, _, row = _rows_of_program(rows, BLOCK_R)
    own = row < rows
    of_row = tl.load(row_gates + image * rows + row, mask=own, other=0.0)
    for first in range(0, columns, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        exists = column < columns
        inside = own[:, None] & exists[None, :]
        places = row[:, None] * columns + column[None, :]
        of_column = tl.load(column_gates + image * columns + column, mask=exists, other=0.0)
        values = maps.load(y + image * rows * columns, places, inside)
        maps.store(
            out + image * rows * columns,
            places,
            inside,
            values * (of_row[:, None] + of_column[None, :]),
        )


@triton.jit(do_not_specialize=maps.SIZES)
def _dual_gate_gradient_kernel(
    grad_out,
    y,
    of_rows,  # (4, B, rows): gates, what the mean adds, the largest, what being it adds
    of_columns,  # (4, B, columns)
    grad_y,
    batch,
    row_vectors,
    rows,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = row_vectors * VECTOR
    image, _, row = _rows_of_program(rows, BLOCK_R)
    own = row < rows
    from_row = of_rows + image * rows + row
    row_gate = tl.load(from_row, mask=own, other=0.0)
    row_mean = tl.load(from_row + batch * rows, mask=own, other=0.0)
    row_largest = tl.load(from_row + 2 * batch * rows, mask=own, other=0.0)
    row_share = tl.load(from_row + 3 * batch * rows, mask=own, other=0.0)
    for first in range(0, columns, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        exists = column < columns
        inside = own[:, None] & exists[None, :]
        places = row[:, None] * columns + column[None, :]
        from_column = of_columns + image * columns + column
        gate = tl.load(from_column, mask=exists, other=0.0)
        mean = tl.load(from_column + batch * columns, mask=exists, other=0.0)
        largest = tl.load(from_column + 2 * batch * columns, mask=exists, other=0.0)
        share = tl.load(from_column + 3 * batch * columns, mask=exists, other=0.0)
        grad = maps.load(grad_out + image * rows * columns, places, inside)
        values = maps.load(y + image * rows * columns, places, inside)
        result = grad * (row_gate[:, None] + gate[None, :]) + (row_mean[:, None] + mean[None, :])
        result += tl.where(values == row_largest[:, None], row_share[:, None], 0.0)
        result += tl.where(values == largest[None, :], share[None, :], 0.0)
        maps.store(grad_y + image * rows * columns, places, inside, result)


def forward(y: Tensor, weights: Sequence[Tensor], out: Tensor) -> Tensor:
    """Fill out, and return the state, see csrc/include/kernelpose/dual_gate.h; y and out
    (B, C, H, W) are dense and lie alike, not empty."""
    reduce_weight, expand_weight, spatial_weight = weights
    layout, grid, last = _layout(y)
    of_rows, of_columns = _scratch(y)
    with torch.cuda.device_of(y):
        _dual_gate_peaks_kernel[grid](y, of_rows, of_columns, y.shape[0], **layout, **OPTIONS)
        rows = of_rows[0] / _columns(y), of_rows[1]
        columns = of_columns[0].sum(1) / of_rows.shape[2], of_columns[1].amax(1)
        (mean, largest), (pixel_mean, pixel_largest) = (columns, rows) if last else (rows, columns)
        hidden = [pooled @ reduce_weight.flatten(1).t() for pooled in (mean, largest)]
        active = hidden[0].relu() + hidden[1].relu()
        of_channels = torch.sigmoid(active @ expand_weight.flatten(1).t())
        pooled = torch.stack((pixel_mean, pixel_largest), 1).unflatten(2, y.shape[2:])
        of_pixels = torch.sigmoid((_neighbours(pooled) * spatial_weight.view(-1, 1)).sum(1))
        row_gates, column_gates = (of_pixels, of_channels) if last else (of_channels, of_pixels)
        _dual_gate_output_kernel[grid](y, row_gates, column_gates, out, **layout, **OPTIONS)
    return torch.cat((mean, largest, pixel_mean, pixel_largest, of_channels, of_pixels, *hidden), 1)


def backward(
    grad_out: Tensor,
    y: Tensor,
    weights: Sequence[Tensor],
    state: Tensor,
    grad_y: Tensor,
    partials: Tensor,
) -> None:
    """Fill grad_y and partials, see csrc/include/kernelpose/dual_gate.h; the maps lie alike."""
    reduce_weight, expand_weight, spatial_weight = weights
    layout, grid, last = _layout(y)
    of_rows, of_columns = _scratch(y)
    batch, channels, height, width = y.shape
    hidden, pixels = reduce_weight.shape[0], height * width
    sizes = (channels, channels, pixels, pixels, channels, pixels, 2 * hidden)
    _, largest, pixel_mean, pixel_largest, gate, pixel_gate, before = state.split(sizes, 1)

    def by_side(of_channels: Tensor, of_pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(of the rows, of the columns), dense."""
        sides = (of_pixels, of_channels) if last else (of_channels, of_pixels)
        return sides[0].contiguous(), sides[1].contiguous()

    with torch.cuda.device_of(y):
        _dual_gate_shares_kernel[grid](
            *(grad_out, y, *by_side(largest, pixel_largest), of_rows, of_columns, batch),
            **layout,
            **OPTIONS,
        )
        joined = of_columns.sum(2)
        (dots, counts), (pixel_dots, pixel_counts) = (
            (joined, of_rows) if last else (of_rows, joined)
        )
        of_sigmoids = dots * gate * (1 - gate)
        of_active = of_sigmoids @ expand_weight.flatten(1)
        of_hidden = torch.where(before > 0, of_active.repeat(1, 2), 0.0)
        of_pooled = of_hidden.view(batch, 2, hidden) @ reduce_weight.flatten(1)
        of_pixels = pixel_dots * pixel_gate * (1 - pixel_gate)
        turned = spatial_weight.view(2, TAPS, 1).flip(1)
        around = _neighbours(of_pixels.view(batch, 1, height, width))
        of_means = ((turned[0] * around).sum(1), (turned[1] * around).sum(1))
        pooled = torch.stack((pixel_mean, pixel_largest), 1).view(batch, 2, height, width)
        of_kernel = (_neighbours(pooled) * of_pixels[:, None]).sum(2)
        torch.cat((of_sigmoids, of_hidden, of_kernel), 1, out=partials)
        factors = [
            by_side(gate, pixel_gate),
            by_side(of_pooled[:, 0] / pixels, of_means[0] / channels),
            by_side(largest, pixel_largest),
            by_side(of_pooled[:, 1] / counts, of_means[1] / pixel_counts),
        ]
        sides = (torch.stack([pair[side] for pair in factors]) for side in (0, 1))
        _dual_gate_gradient_kernel[grid](grad_out, y, *sides, grad_y, batch, **layout, **OPTIONS)


def _neighbours(pooled: Tensor) -> Tensor:
    """(B, N, H, W) -> (B, N·49, H·W): what lies under each tap of the kernel."""
    return F.unfold(pooled, KERNEL, padding=KERNEL // 2)


def _layout(y: Tensor) -> tuple[dict[str, Any], tuple[int], bool]:
    """(arguments that say how y lies, the grid, whether rows are pixels)."""
    own = maps.layout(y)
    layout = {key: own[key] for key in (*maps.SIZES, "VECTOR")} | BLOCKS
    return layout, (y.shape[0] * _blocks(own["rows"]),), own["CHANNELS_LAST"]


def _columns(y: Tensor) -> int:
    own = maps.layout(y)
    columns: int = own["row_vectors"] * own["VECTOR"]
    return columns


def _blocks(rows: int) -> int:
    return -(-rows // BLOCKS["BLOCK_R"])


def _scratch(y: Tensor) -> tuple[Tensor, Tensor]:
    """of_rows and of_columns."""
    rows = maps.layout(y)["rows"]
    columns = (2, y.shape[0], _blocks(rows), _columns(y))
    of_rows, of_columns = (
        torch.empty(shape, dtype=torch.float32, device=y.device)
        for shape in ((2, y.shape[0], rows), columns)
    )
    return of_rows, of_columns
