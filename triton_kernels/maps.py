"""Tiles of feature maps in either memory format, for ops that sum over the pixels of each channel.

A program takes a block of channels of one image and walks over its pixels in tiles (BLOCK_P,
BLOCK_C). Along the axis of neighbours there are row_vectors * VECTOR elements, so that the compiler
sees by how much it can widen an access; along the other one there are `rows`.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

ALONG, ACROSS = 64, 32  # elements of a tile along the axis of neighbours and across
SIZES = ["row_vectors", "rows"]


@triton.jit
def sizes(row_vectors, rows, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(channels, pixels) of an image."""
    row = row_vectors * VECTOR
    if CHANNELS_LAST:
        return row, rows
    return rows, row


@triton.jit
def block(channels, BLOCK_C: tl.constexpr):
    """(image, its channels) of this program."""
    blocks = tl.cdiv(channels, BLOCK_C)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return (tl.program_id(0) // blocks).to(tl.int64), channel


@triton.jit
def tile(first, channel, channels, pixels, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr):
    """(places in the image, which of them exist) of BLOCK_P pixels from `first` on."""
    pixel = first + tl.arange(0, BLOCK_P)
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    if CHANNELS_LAST:
        return pixel[:, None] * channels + channel[None, :], inside
    return channel[None, :] * pixels + pixel[:, None], inside


@triton.jit
def load(pointer, places, inside):
    return tl.load(pointer + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, places, inside, values):
    tl.store(pointer + places, values.to(pointer.dtype.element_ty), mask=inside)


def layout(maps: Tensor) -> dict[str, Any]:
    """The arguments that say how maps (B, C, H, W), dense, lie."""
    channels, pixels = maps.shape[1], maps.shape[2] * maps.shape[3]
    last = not maps.is_contiguous()
    row, rows = (channels, pixels) if last else (pixels, channels)
    vector = math.gcd(row, 16 // maps.element_size())
    return {
        "row_vectors": row // vector,
        "rows": rows,
        "VECTOR": vector,
        "CHANNELS_LAST": last,
        "BLOCK_P": ACROSS if last else ALONG,
        "BLOCK_C": ALONG if last else ACROSS,
    }


def grid(maps: Tensor) -> tuple[int]:
    block_c = ACROSS if maps.is_contiguous() else ALONG
    return (maps.shape[0] * triton.cdiv(maps.shape[1], block_c),)
