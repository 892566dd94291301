"""Skeletons drawn over a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernelpose.data import raster
from kernelpose.data.images import pillow
from kernelpose.data.raster import Array
from kernelpose.data.skeletons import COCO, Skeleton

# Told apart by every common form of colour blindness, on light and on dark ground.
SIDE_COLORS = {"left": (255, 150, 28), "right": (40, 178, 255), "center": (245, 245, 240)}
_OUTLINE = (14, 18, 26)
_FAINTEST = 0.16  # Opacity at confidence 0: doubtful joints stay visible, as ghosts.


@dataclass(frozen=True)
class Person:
    """Joints (K, 2) in image pixels, their scores (K,), and the score of the whole."""

    keypoints: Array
    scores: Array
    score: float


def draw_poses(
    image: NDArray[np.uint8], persons: Sequence[Person], *, skeleton: Skeleton = COCO
) -> NDArray[np.uint8]:
    """The image (H, W, 3) uint8 RGB with each person's skeleton on it, in a new array.

    Limbs are coloured by the person's own side and fade with their joints' scores; a tag above
    each person gives the score. The surest person is drawn last.
    """
    canvas = image.astype(np.float32)
    ordered = sorted(persons, key=lambda person: person.score)
    for person in ordered:
        _draw_person(canvas, person, skeleton)
    pixels = np.rint(canvas).clip(0, 255).astype(np.uint8)
    return _write_labels(pixels, ordered) if ordered else pixels


def _draw_person(canvas: Array, person: Person, skeleton: Skeleton) -> None:
    points = person.keypoints.astype(np.float32)
    opacity = _FAINTEST + (1 - _FAINTEST) * np.clip(person.scores / 0.85, 0, 1)
    radius = _limb_radius(points, canvas.shape)
    rim = max(1.0, 0.42 * radius)
    face = {i for i, name in enumerate(skeleton.names) if name.endswith(("nose", "eye", "ear"))}
    for colored in (False, True):
        for a, b in skeleton.links:
            width = radius * (0.6 if a in face or b in face else 1.0)
            color = SIDE_COLORS[skeleton.side(a, b)] if colored else _OUTLINE
            grow, strength = (0.0, 1.0) if colored else (rim, 0.75)
            ends = points[[a, b]], opacity[[a, b]] * strength
            _stroke(canvas, *ends, width + grow, color)
    for joint, point in enumerate(points):
        size = radius * (1.0 if joint in face else 1.55)
        color = SIDE_COLORS[skeleton.side(joint)]
        layers = ((size + rim, _OUTLINE, 0.9), (size, color, 1.0), (size * 0.45, (255,) * 3, 0.9))
        for width, fill, strength in layers:
            ends = np.stack((point, point)), np.full(2, opacity[joint] * strength)
            _stroke(canvas, *ends, width, fill)


def _limb_radius(points: Array, shape: tuple[int, ...]) -> float:
    extent = float(np.linalg.norm(np.ptp(points, axis=0)))
    return max(1.3, min(0.0085 * extent, 0.007 * (shape[0] + shape[1])))


def _stroke(
    canvas: Array, ends: Array, opacities: Array, radius: float, color: tuple[int, ...]
) -> None:
    """A round-ended line whose opacity runs from one end's to the other's."""
    part = raster.window(canvas.shape, ends, radius)
    if canvas[part].size == 0:
        return
    positions = raster.grid(part)
    cover = raster.coverage(raster.capsule(positions, ends[0], ends[1], radius, radius))
    t = raster.along_segment(positions, ends[0], ends[1])
    fade = opacities[0] + t * (opacities[1] - opacities[0])
    raster.blend(canvas, part, np.array(color, np.float32), (cover * fade).astype(np.float32))


def _write_labels(pixels: NDArray[np.uint8], persons: Sequence[Person]) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    base = pillow("Image").fromarray(pixels)
    draw = pillow("ImageDraw").Draw(base, "RGBA")
    for person in persons:
        extent = float(np.ptp(person.keypoints[:, 1]))
        size = max(8.0, min(max(0.05 * extent, 11.0), 0.035 * (height + width)))
        font = pillow("ImageFont").load_default(size)
        text = f"{person.score:.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        pad = 0.35 * size
        w, h = right - left + 2 * pad, bottom - top + 1.4 * pad
        middle = float(person.keypoints[:, 0].mean())
        x = float(np.clip(middle - w / 2, 1, max(1, width - w - 1)))
        above = float(person.keypoints[:, 1].min()) - 0.09 * extent - h
        y = float(np.clip(above, 1, max(1, height - h - 1)))
        draw.rounded_rectangle((x, y, x + w, y + h), h / 2, fill=(*_OUTLINE, 170))
        draw.text((x + pad - left, y + 0.7 * pad - top), text, font=font, fill=(255, 255, 255))
    return np.asarray(base).copy()
