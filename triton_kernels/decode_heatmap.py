"""Heatmap decoding in Triton; what is computed: `kernelpose/reference/decode_heatmap.py`.

One program: one map. It finds the peak; a lane for each of the 9 or 25 pixels beside it sums up
the blur there; the step is computed on scalars. The whole map is blurred only where the clipping
could tell the difference, see `csrc/include/kernelpose/decode_heatmap.h`.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .peak import find_peak

BLOCK = 1024  # pixels among which the peak is looked for at a time
TILE = 16  # rows and columns that are blurred at a time, where all are
OPTIONS = {"num_warps": 4}
REGISTERS = 96  # a thread at most, on either architecture


@triton.jit
def _clamped(i, size):
    return tl.minimum(tl.maximum(i, 0), size - 1)


@triton.jit
def _source(i, size, MODE: tl.constexpr):
    """Which of `size` rows or columns the blur reads at `i`, which may lie outside; -1: zero."""
    if MODE == "mmpose0":  # gfedcb|abcdefgh|gfedcba
        period = tl.maximum(2 * size - 2, 1)
        turned = (i % period + period) % period
        source = tl.where(turned < size, turned, period - turned)
    elif MODE == "transformers":  # dcba|abcdefgh|hgfe
        period = 2 * size
        turned = (i % period + period) % period
        source = tl.where(turned < size, turned, period - 1 - turned)
    else:
        source = tl.where((i >= 0) & (i < size), i, -1)
    return source


@triton.jit
def _weight(tap, WEIGHTS: tl.constexpr):
    """The blur's weight at each tap, 0 beyond them."""
    weight = tl.where(tap == 0, WEIGHTS[0], 0.0)
    for k in tl.static_range(1, len(WEIGHTS)):
        weight = tl.where(tap == k, WEIGHTS[k], weight)
    return weight


@triton.jit
def _blurred(
    heatmap,
    rows,
    columns,
    height,
    width,
    MODE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """The blurred map at some pixels on it. TAPS: a power of two, len(WEIGHTS) or more."""
    radius: tl.constexpr = len(WEIGHTS) // 2
    tap = tl.arange(0, TAPS)[None, :]
    sources = _source(columns[:, None] + tap - radius, width, MODE)
    along_y = tl.zeros(sources.shape, tl.float32)
    for k in tl.static_range(len(WEIGHTS)):
        row = _source(rows + (k - radius), height, MODE)[:, None]
        inside = (row >= 0) & (sources >= 0) & (tap < len(WEIGHTS))
        values = tl.load(heatmap + row * width + sources, mask=inside, other=0.0)
        along_y += values.to(tl.float32) * WEIGHTS[k]
    return tl.sum(along_y * _weight(tap, WEIGHTS), 1)


@triton.jit
def _blurred_maximum(heatmap, height, width, WEIGHTS: tl.constexpr, TILE: tl.constexpr):
    """The largest number of the blurred map, zeros outside."""
    radius: tl.constexpr = len(WEIGHTS) // 2
    top = tl.full((TILE, TILE), float("-inf"), tl.float32)
    for first in range(0, height, TILE):
        for left in range(0, width, TILE):
            row = first + tl.arange(0, TILE)[:, None]
            column = left + tl.arange(0, TILE)[None, :]
            blurred = tl.zeros((TILE, TILE), tl.float32)
            for i in range(len(WEIGHTS)):
                y = row + i - radius
                along_x = tl.zeros((TILE, TILE), tl.float32)
                for k in tl.static_range(len(WEIGHTS)):
                    x = column + (k - radius)
                    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
                    values = tl.load(heatmap + y * width + x, mask=inside, other=0.0)
                    along_x += values.to(tl.float32) * WEIGHTS[k]
                blurred += along_x * _weight(i, WEIGHTS)
            top = tl.where((row < height) & (column < width), tl.maximum(top, blurred), top)
    return tl.max(tl.max(top, 1), 0)


@triton.jit
def _clipped(value, MODE: tl.constexpr):
    """The logarithm's argument; NaN stays."""
    if MODE == "dark":
        value = tl.where(value < 1e-10, 1e-10, value)
    else:
        value = tl.where(value < 1e-3, 1e-3, tl.where(value > 50.0, 50.0, value))
    return value


@triton.jit
def _finite_or_zero(x):
    return tl.where(x - x == 0, x, 0.0)


@triton.jit
def _newton_step(dx, dy, dxx, dxy, dyy, damping):
    """-H^-1 g in float64: a flat peak is nearly singular."""
    dx, dy, dxy = dx.to(tl.float64), dy.to(tl.float64), dxy.to(tl.float64)
    dxx, dyy = dxx.to(tl.float64) + damping, dyy.to(tl.float64) + damping
    determinant = dxx * dyy - dxy * dxy
    step_x = (dxy * dy - dyy * dx) / determinant
    step_y = (dxy * dx - dxx * dy) / determinant
    return step_x.to(tl.float32), step_y.to(tl.float32)


@triton.jit
def _at(near, dx, dy, REACH: tl.constexpr, LANES: tl.constexpr):
    lane = (dy + REACH) * (2 * REACH + 1) + dx + REACH
    return tl.sum(tl.where(tl.arange(0, LANES) == lane, near, 0.0), 0)


@triton.jit
def _refinement(
    heatmap, top, present, x, y, height, width,
    MODE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    TAPS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The step from the peak `top` at x, y, in pixels."""
    REACH: tl.constexpr = 2 if MODE == "dark" else 1
    SIDE: tl.constexpr = 2 * REACH + 1
    LANES: tl.constexpr = 32 if MODE == "dark" else 16
    lane = tl.arange(0, LANES)
    rows = _clamped(y + lane // SIDE - REACH, height)
    columns = _clamped(x + lane % SIDE - REACH, width)
    if MODE == "shift":
        near = tl.load(heatmap + rows * width + columns).to(tl.float32)
    else:
        near = _blurred(heatmap, rows, columns, height, width, MODE, WEIGHTS, TAPS)
        if MODE == "mmpose1" or MODE == "dark":
            factor = top / _at(near, 0, 0, REACH, LANES)
            scaled = near * factor
            clips = (_clipped(near, MODE) != near) | (_clipped(scaled, MODE) != scaled)
            if present & (tl.max(tl.where(lane < SIDE * SIDE, clips.to(tl.int32), 0), 0) != 0):
                factor = top / _blurred_maximum(heatmap, height, width, WEIGHTS, TILE)
            near *= factor
        near = tl.log(_clipped(near, MODE))

    center = _at(near, 0, 0, REACH, LANES)
    left, right = _at(near, -1, 0, REACH, LANES), _at(near, 1, 0, REACH, LANES)
    above, below = _at(near, 0, -1, REACH, LANES), _at(near, 0, 1, REACH, LANES)
    if MODE == "shift":  # the bounds are mmpose's
        in_x = (x > 1) & (x < width - 1) & (y > 0)
        in_y = (y > 1) & (y < height - 1) & (x > 0)
        step_x = tl.where(in_x, (right > left).to(tl.float32) - (right < left).to(tl.float32), 0.0)
        step_y = tl.where(
            in_y, (below > above).to(tl.float32) - (below < above).to(tl.float32), 0.0
        )
        step_x *= 0.25
        step_y *= 0.25
    elif MODE == "dark":
        dxx = _at(near, 2, 0, REACH, LANES) - 2.0 * center + _at(near, -2, 0, REACH, LANES)
        dyy = _at(near, 0, 2, REACH, LANES) - 2.0 * center + _at(near, 0, -2, REACH, LANES)
        rising = _at(near, 1, 1, REACH, LANES) - _at(near, 1, -1, REACH, LANES)
        falling = _at(near, -1, 1, REACH, LANES) - _at(near, -1, -1, REACH, LANES)
        step_x, step_y = _newton_step(
            0.5 * (right - left), 0.5 * (below - above),
            0.25 * dxx, 0.25 * (rising - falling), 0.25 * dyy, 0.0,
        )  # fmt: skip
        inside = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2)
        step_x, step_y = tl.where(inside, step_x, 0.0), tl.where(inside, step_y, 0.0)
    else:
        diagonal = _at(near, 1, 1, REACH, LANES) + _at(near, -1, -1, REACH, LANES)
        step_x, step_y = _newton_step(
            0.5 * (right - left), 0.5 * (below - above),
            right - 2.0 * center + left,
            0.5 * (diagonal - right - below + 2.0 * center - left - above),
            below - 2.0 * center + above, 1.1920928955078125e-07,
        )  # fmt: skip
    return _finite_or_zero(step_x), _finite_or_zero(step_y)


@triton.jit
def _store_coordinate(keypoints, joint, axis, location, centers, scales, person, span):
    if centers is not None:
        extent = tl.load(scales + 2 * person + axis)
        location = location * (extent / span) + (tl.load(centers + 2 * person + axis) - extent / 2)
    tl.store(keypoints + 2 * joint + axis, location)


@triton.jit(do_not_specialize=["joints"])
def _decode_heatmap_kernel(
    heatmaps,  # (persons * joints, height, width)
    centers,  # (persons, 2) float32, or None
    scales,
    keypoints,  # (persons * joints, 2) float32
    scores,  # (persons * joints,) float32
    joints,
    height,
    width,
    span_x,  # what scales span, in pixels of the map
    span_y,
    MODE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    joint = tl.program_id(0).to(tl.int64)
    heatmap = heatmaps + joint * (height * width)
    top, place, nan = find_peak(heatmap, height * width, BLOCK)
    present = (nan == 0) & (top > 0) & (top - top == 0)
    x, y = place % width, place // width
    location_x, location_y = x.to(tl.float32), y.to(tl.float32)
    if MODE != "argmax":
        step_x, step_y = _refinement(
            heatmap, top, present, x, y, height, width, MODE, WEIGHTS, TAPS, TILE
        )
        location_x += step_x
        location_y += step_y
    location_x = tl.where(present, location_x, -1.0)
    location_y = tl.where(present, location_y, -1.0)
    person = joint // joints
    _store_coordinate(keypoints, joint, 0, location_x, centers, scales, person, span_x)
    _store_coordinate(keypoints, joint, 1, location_y, centers, scales, person, span_y)
    tl.store(scores + joint, tl.where(nan != 0, 0.0, _finite_or_zero(top)))


def forward(
    heatmaps: Tensor,
    centers: Tensor | None,
    scales: Tensor | None,
    keypoints: Tensor,
    scores: Tensor,
    mode: str,
    weights: Sequence[float],
    udp: bool,
) -> None:
    """Fill keypoints (P, K, 2) and scores (P, K) from contiguous maps (P, K, h, w), not empty."""
    persons, joints, height, width = heatmaps.shape
    with torch.cuda.device_of(heatmaps):
        _decode_heatmap_kernel[(persons * joints,)](
            *(heatmaps, centers, scales, keypoints, scores, joints, height, width),
            *(float(width - udp), float(height - udp)),
            MODE=mode,
            WEIGHTS=tuple(weights),
            TAPS=triton.next_power_of_2(len(weights)),
            BLOCK=BLOCK,
            TILE=TILE,
            **OPTIONS,
        )
