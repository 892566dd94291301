"""Residual addition and LayerNorm in Triton, forward and backward.

What is computed: `kernelpose/reference/add_layer_norm.py`, and its gradient as
csrc/include/kernelpose/add_layer_norm.h derives it. A program takes whole rows, one tile (ROWS,
BLOCK), which it reads once; backward it goes over many and adds up what they give to the
parameters. Every sum has one order: no atomics, the same bits on every run.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # elements, where a row has no more
PARTS = 264  # programs of the backward pass at most: two for each SM of an H100
REGISTERS = {4: 128, 8: 255}  # a thread at most, on either architecture, by warps
SIZES = ["vectors", "rows"]


@triton.jit
def _places(tile, channels, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, columns, places in the tensors, which of them exist) of a tile."""
    row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < channels)[None, :]
    return row, column, row[:, None] * channels + column[None, :], inside


@triton.jit
def _load(pointer, places, inside):
    return tl.load(pointer + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, places, inside, values):
    tl.store(pointer + places, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _add_layer_norm_kernel(
    x,
    residual,
    weight,  # (C,)
    bias,
    total,
    norm,
    moments,  # (2, rows) or None
    eps,
    vectors,
    rows,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channels = vectors * VECTOR
    row, column, places, inside = _places(tl.program_id(0), channels, rows, ROWS, BLOCK)
    own = _load(x, places, inside) + _load(residual, places, inside)
    own = own.to(total.dtype.element_ty)
    tl.store(total + places, own, mask=inside)
    own = own.to(tl.float32)  # as rounded
    mean = tl.sum(own, 1) / channels
    deviation = tl.where(inside, own - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(deviation * deviation, 1) / channels + eps)
    scale = _load(weight, column, column < channels)
    offset = _load(bias, column, column < channels)
    values = deviation * inverse[:, None] * scale[None, :] + offset[None, :]
    _store(norm, places, inside, values)
    if moments is not None:
        tl.store(moments + row, mean, mask=row < rows)
        tl.store(moments + rows + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=[*SIZES, "tiles"])
def _add_layer_norm_gradient_kernel(
    grad_sum,  # or None
    grad_norm,
    total,
    moments,  # (2, rows)
    weight,  # (C,)
    grad_residual,
    grad_x,  # or None
    parts,  # (programs, 2, C)
    vectors,
    rows,
    tiles,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channels = vectors * VECTOR
    column = tl.arange(0, BLOCK)
    scale = _load(weight, column, column < channels)
    grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, _, places, inside = _places(tile, channels, rows, ROWS, BLOCK)
        mean = tl.load(moments + row, mask=row < rows, other=0.0)
        inverse = tl.load(moments + rows + row, mask=row < rows, other=0.0)
        given = _load(grad_norm, places, inside)
        own = _load(total, places, inside)
        n = tl.where(inside, (own - mean[:, None]) * inverse[:, None], 0.0)
        h = given * scale[None, :]
        mean_h = tl.sum(h, 1) / channels
        mean_hn = tl.sum(h * n, 1) / channels
        grad = (h - mean_h[:, None] - n * mean_hn[:, None]) * inverse[:, None]
        if grad_sum is not None:
            grad += _load(grad_sum, places, inside)
        _store(grad_residual, places, inside, grad)
        if grad_x is not None:
            _store(grad_x, places, inside, grad)
        grad_weight += given * n
        grad_bias += given
    parts += tl.program_id(0).to(tl.int64) * 2 * channels
    tl.store(parts + column, tl.sum(grad_weight, 0), mask=column < channels)
    tl.store(parts + channels + column, tl.sum(grad_bias, 0), mask=column < channels)


def layout(total: Tensor) -> dict[str, Any]:
    """The arguments that say how rows are laid on tiles."""
    channels = total.shape[-1]
    vector = math.gcd(channels, 16 // total.element_size())
    block = max(triton.next_power_of_2(channels), 16)
    return {
        "vectors": channels // vector,
        "rows": total.numel() // channels,
        "VECTOR": vector,
        "ROWS": max(TILE // block, 1),
        "BLOCK": block,
        "num_warps": 4 if block <= TILE else 8,
    }


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    total: Tensor,
    norm: Tensor,
    moments: Tensor | None,
    eps: float,
) -> None:
    """Fill total, norm and moments, see csrc/cuda/add_layer_norm.h; all are contiguous, none is
    empty."""
    how = layout(total)
    grid = (triton.cdiv(how["rows"], how["ROWS"]),)
    with torch.cuda.device_of(x):
        _add_layer_norm_kernel[grid](x, residual, weight, bias, total, norm, moments, eps, **how)


def backward(
    grad_sum: Tensor | None,
    grad_norm: Tensor,
    total: Tensor,
    moments: Tensor,
    weight: Tensor,
    grad_residual: Tensor,
    grad_x: Tensor | None,
    grad_parameters: Tensor,
) -> None:
    """Fill the gradients of residual, of x, where it has a dtype of its own, and of weight and bias
    (2, C)."""
    how = layout(total)
    tiles = triton.cdiv(how["rows"], how["ROWS"])
    programs = min(tiles, PARTS)
    parts = grad_parameters.new_empty(programs, *grad_parameters.shape)
    tensors = (grad_sum, grad_norm, total, moments, weight, grad_residual, grad_x, parts)
    with torch.cuda.device_of(total):
        _add_layer_norm_gradient_kernel[(programs,)](*tensors, tiles=tiles, **how)
    torch.sum(parts, 0, out=grad_parameters)
