"""The flip test's mean in Triton; what is computed: `kernelpose/reference/flip_merge.py`.

One program: BLOCK pixels of one map, and the pixels of the partner's mirrored map that they meet.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
OPTIONS = {"num_warps": 4}
REGISTERS = 40  # a thread at most, on either architecture


@triton.jit(do_not_specialize=["rows"])
def _flip_merge_kernel(
    heatmaps,  # (maps, rows, width)
    flipped,
    out,
    rows,
    width,
    ORDER: tl.constexpr,  # the joint of the mirrored input that is each joint
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixels = rows * width
    blocks = tl.cdiv(pixels, BLOCK)
    joints: tl.constexpr = len(ORDER)
    map_index = tl.program_id(0) // blocks
    joint = map_index % joints
    source = joint
    for j in tl.static_range(joints):
        if ORDER[j] != j:
            source = tl.where(joint == j, ORDER[j], source)
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    column = pixel % width
    mirrored = width - 1 - column
    if SHIFT:
        mirrored = tl.minimum(mirrored + 1, width - 1)
    base = map_index.to(tl.int64) * pixels
    back = flipped + (base + (source - joint).to(tl.int64) * pixels)
    a = tl.load(heatmaps + base + pixel, mask=inside).to(tl.float32)
    b = tl.load(back + (pixel - column + mirrored), mask=inside).to(tl.float32)
    tl.store(out + base + pixel, ((a + b) * 0.5).to(out.dtype.element_ty), mask=inside)


def forward(
    heatmaps: Tensor, flipped: Tensor, out: Tensor, order: Sequence[int], shift: bool
) -> None:
    """Fill out; all (P, K, ..., w), contiguous, not empty."""
    persons, joints, *rows, width = heatmaps.shape
    pixels = math.prod(rows) * width
    with torch.cuda.device_of(heatmaps):
        _flip_merge_kernel[(persons * joints * triton.cdiv(pixels, BLOCK),)](
            *(heatmaps, flipped, out, math.prod(rows), width),
            ORDER=tuple(order),
            SHIFT=shift,
            BLOCK=BLOCK,
            **OPTIONS,
        )
