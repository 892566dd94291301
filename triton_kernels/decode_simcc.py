"""SimCC decoding in Triton; what is computed: `kernelpose/reference/decode_simcc.py`.

One program: the two rows of logits of one joint, BLOCK bins at a time. Each lane keeps its largest
logit and the first bin that holds it; of equal lanes the first bin counts.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .peak import find_peak

BLOCK = 512
OPTIONS = {"num_warps": 2}
REGISTERS = 64  # a thread at most, on either architecture


@triton.jit
def _store_coordinate(points, joint, axis, location, center, scale, person, span):
    if center is not None:
        extent = tl.load(scale + 2 * person + axis)
        location = location * (extent / span) + (tl.load(center + 2 * person + axis) - extent / 2)
    tl.store(points + 2 * joint + axis, location)


@triton.jit(do_not_specialize=["joints"])
def _decode_simcc_kernel(
    x,  # (persons * joints, bins_x)
    y,  # (persons * joints, bins_y)
    centers,  # (persons, 2) float32, or None
    scales,
    points,  # (persons * joints, 2) float32
    scores,  # (persons * joints,) float32
    joints,
    bins_x,
    bins_y,
    split_ratio,
    span_x,
    span_y,
    BLOCK: tl.constexpr,
):
    joint = tl.program_id(0).to(tl.int64)
    person = joint // joints
    best_x, bin_x, nan_x = find_peak(x + joint * bins_x, bins_x, BLOCK)
    best_y, bin_y, nan_y = find_peak(y + joint * bins_y, bins_y, BLOCK)
    score = tl.where((nan_x | nan_y) != 0, 0.0, tl.minimum(best_x, best_y))
    location_x = tl.where(score > 0, bin_x.to(tl.float32), -1.0) / split_ratio
    location_y = tl.where(score > 0, bin_y.to(tl.float32), -1.0) / split_ratio
    _store_coordinate(points, joint, 0, location_x, centers, scales, person, span_x)
    _store_coordinate(points, joint, 1, location_y, centers, scales, person, span_y)
    tl.store(scores + joint, score)


def forward(
    x: Tensor,
    y: Tensor,
    centers: Tensor | None,
    scales: Tensor | None,
    points: Tensor,
    scores: Tensor,
    split_ratio: float,
    spans: Sequence[float],
) -> None:
    """Fill points (P, K, 2) and scores (P, K) from contiguous logits (P, K, bins), not empty.

    spans: what scales span, (width, height) in pixels of the input.
    """
    persons, joints, bins = x.shape
    with torch.cuda.device_of(x):
        _decode_simcc_kernel[(persons * joints,)](
            *(x, y, centers, scales, points, scores, joints, bins, y.shape[2]),
            *(split_ratio, *spans),
            BLOCK=BLOCK,
            **OPTIONS,
        )
