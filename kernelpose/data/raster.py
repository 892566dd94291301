"""Anti-aliased shapes on a numpy canvas, from signed distances."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Window = tuple[slice, slice]


def window(shape: tuple[int, ...], points: Array, margin: float) -> Window:
    """The part of a canvas of ``shape`` within ``margin`` of points (N, 2), maybe empty."""
    low = np.floor(points.min(0) - margin - 1)
    high = np.ceil(points.max(0) + margin + 2)
    limits = np.array([shape[1], shape[0]])
    (x0, y0), (x1, y1) = (np.clip(edge, 0, limits).astype(int) for edge in (low, high))
    return slice(int(y0), int(y1)), slice(int(x0), int(x1))


def grid(part: Window) -> Array:
    """Pixel positions (h, w, 2) as x, y of a window."""
    rows, columns = part
    y, x = np.mgrid[rows, columns]
    return np.stack((x, y), -1).astype(np.float32)


def along_segment(positions: Array, start: Array, end: Array) -> Array:
    """Where along the segment each position projects: 0 at start, 1 at end."""
    axis = end - start
    length = max(float(axis @ axis), 1e-12)
    return np.clip((positions - start) @ axis / np.float32(length), 0, 1)


def capsule(
    positions: Array, start: Array, end: Array, start_radius: float, end_radius: float
) -> Array:
    """Signed distance to a segment with rounded ends and a radius that runs linearly."""
    t = along_segment(positions, start, end)
    nearest = start + t[..., None] * (end - start)
    radius = start_radius + t * (end_radius - start_radius)
    return np.linalg.norm(positions - nearest, axis=-1) - radius


def ellipse(positions: Array, center: Array, radii: Array) -> Array:
    """Signed distance to an axis-aligned ellipse, to first order."""
    scaled = (positions - center) / radii
    norm = np.maximum(np.linalg.norm(scaled, axis=-1), 1e-2)
    slope = np.maximum(np.linalg.norm(scaled / radii, axis=-1), 1e-2 / np.max(radii))
    return norm * (norm - 1) / slope


def polygon(positions: Array, corners: Array, rounding: float) -> Array:
    """Signed distance to a convex polygon, corners clockwise on the screen, rounded outwards."""
    following = np.roll(corners, -1, axis=0)
    outside = np.full(positions.shape[:2], -np.inf, np.float32)
    nearest = np.full(positions.shape[:2], np.inf, np.float32)
    for start, end in zip(corners, following, strict=True):
        axis = (end - start) / np.linalg.norm(end - start)
        normal = np.array([axis[1], -axis[0]], np.float32)
        outside = np.maximum(outside, (positions - start) @ normal)
        t = along_segment(positions, start, end)
        edge = np.linalg.norm(positions - (start + t[..., None] * (end - start)), axis=-1)
        nearest = np.minimum(nearest, edge)
    return np.where(outside > 0, nearest, -nearest) - np.float32(rounding)


def union(first: Array, second: Array, softness: float) -> Array:
    """Signed distance to both shapes, their seam rounded over about ``softness`` pixels."""
    near = np.maximum(softness - np.abs(first - second), 0) / softness
    return np.minimum(first, second) - near * near * np.float32(softness / 4)


def coverage(distance: Array) -> Array:
    """How much of each pixel a shape covers, from its signed distance."""
    return np.clip(0.5 - distance, 0, 1)


def blend(canvas: Array, part: Window, color: Array, alpha: Array) -> None:
    """Lay a colour (or an (h, w, 3) of colours) over a window of the canvas, in place."""
    region = canvas[part]
    region += (color - region) * alpha[..., None]
