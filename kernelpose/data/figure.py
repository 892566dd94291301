"""A person that the package draws itself, for demonstrations without a photograph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernelpose.data import raster
from kernelpose.data.raster import Array

SIZE = (640, 480)

_SKIN, _SHIRT, _TROUSERS = (226, 168, 136), (46, 134, 138), (58, 66, 92)
_HAIR, _SHOE, _INK = (74, 48, 38), (214, 84, 62), (46, 34, 34)

# x, y of the 17 COCO joints in a picture of SIZE. The person faces us: their left is our right.
_JOINTS = {
    "nose": (244, 131),
    "left_eye": (258, 118),
    "right_eye": (229, 119),
    "left_ear": (276, 123),
    "right_ear": (211, 125),
    "left_shoulder": (296, 205),
    "right_shoulder": (190, 209),
    "left_elbow": (362, 158),
    "right_elbow": (134, 282),
    "left_wrist": (347, 76),
    "right_wrist": (189, 338),
    "left_hip": (274, 356),
    "right_hip": (213, 358),
    "left_knee": (287, 456),
    "right_knee": (184, 455),
    "left_ankle": (290, 556),
    "right_ankle": (159, 551),
}


@dataclass(frozen=True)
class Figure:
    """A picture (H, W, 3) uint8 RGB, its person's COCO joints (17, 2) and box (x, y, w, h)."""

    image: NDArray[np.uint8]
    keypoints: Array
    box: Array


def draw_figure() -> Figure:
    """One person, waving, before a studio wall: the same pixels on every call."""
    canvas = _background()
    point = {name: np.array(xy, np.float32) for name, xy in _JOINTS.items()}
    painter = _Painter(canvas)
    _paint_legs(painter, point)
    _paint_torso(painter, point)
    _paint_forearms(painter, point)
    _paint_head(painter, point)
    keypoints = np.array(list(_JOINTS.values()), np.float32)
    # From the hair to the soles, the raised hand included.
    box = np.array([118, 38, 262, 558], np.float32)
    return Figure(np.rint(canvas).clip(0, 255).astype(np.uint8), keypoints, box)


class _Painter:
    """Lays shaded shapes over a canvas, back to front."""

    _LIGHT = np.array([-0.45, -0.55, 0.70], np.float32)

    def __init__(self, canvas: Array) -> None:
        self.canvas = canvas

    def limb(
        self, points: Sequence[Array], radii: tuple[float, ...], color: tuple[int, int, int]
    ) -> None:
        """A chain of capsules through points, with a radius at each."""
        part = raster.window(self.canvas.shape, np.stack(points), max(radii))
        self.shade(part, _chain(raster.grid(part), points, radii), color, bevel=max(radii))

    def ellipse(
        self,
        center: Array,
        radii: tuple[float, float],
        color: tuple[int, int, int],
        *,
        bevel: float = 0.0,
        above: float = np.inf,
    ) -> None:
        """An ellipse, flat without bevel, cut off below the height ``above``."""
        size = np.array(radii, np.float32)
        part = raster.window(self.canvas.shape, np.stack((center - size, center + size)), 1)
        positions = raster.grid(part)
        distance = raster.ellipse(positions, center, size)
        distance = np.maximum(distance, positions[..., 1] - np.float32(above))
        self.shade(part, distance, color, bevel)

    def shade(
        self, part: raster.Window, distance: Array, color: tuple[int, int, int], bevel: float
    ) -> None:
        """Light a shape as if it bulged towards us over the bevel, darker along its rim."""
        fill = np.array(color, np.float32)
        if bevel > 0:
            down, right = np.gradient(distance)
            tilt = np.clip(1 + distance / np.float32(bevel), 0, 1) ** 1.6
            facing = np.sqrt(np.clip(1 - tilt**2, 0, 1))
            light = (right * tilt) * self._LIGHT[0] + (down * tilt) * self._LIGHT[1]
            light = np.clip(light + facing * self._LIGHT[2], 0, 1)
            rim = np.clip((distance + 2.2) / 2.2, 0, 1) * 0.35
            fill = fill * ((0.52 + 0.62 * light) * (1 - rim))[..., None]
        raster.blend(self.canvas, part, fill, raster.coverage(distance))


def _background() -> Array:
    """A lit wall, a floor, and the soft shadow of whoever stands on it."""
    height, width = SIZE
    y, x = np.mgrid[:height, :width].astype(np.float32)
    glow = np.exp(-(((x - 200) / 330) ** 2) - ((y - 220) / 340) ** 2)[..., None]
    wall = np.array([150, 160, 172], np.float32) + glow * np.array([66, 60, 50], np.float32)
    depth = ((y - 520) / (height - 520)).clip(0, 1)[..., None]
    floor = np.array([128, 122, 118], np.float32) + depth * 34 + glow * 20
    canvas = wall + (floor - wall) * np.clip((y - 508) / 16, 0, 1)[..., None]
    shadow = np.exp(-2.0 * (((x - 236) / 124) ** 2 + ((y - 571) / 20) ** 2))
    canvas *= (1 - 0.55 * shadow)[..., None]
    # A grain of +-1.5 levels, from a hash of the position: flat areas look like no photograph.
    canvas += (np.sin(x * 12.9898 + y * 78.233)[..., None] * 43758.547) % 3 - 1.5
    return canvas.astype(np.float32)


def _xy(x: float, y: float) -> Array:
    return np.array((x, y), np.float32)


def _chain(positions: Array, points: Sequence[Array], radii: tuple[float, ...]) -> Array:
    links = zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True)
    return np.minimum.reduce([raster.capsule(positions, *link) for link in links])


def _paint_legs(painter: _Painter, point: dict[str, Array]) -> None:
    for side, toe in (("right", (-20, 22)), ("left", (15, 25))):
        ankle, toes = point[f"{side}_ankle"], np.array(toe, np.float32)
        painter.limb([ankle + toes * np.float32(0.35), ankle + toes], (13, 12), _SHOE)
    legs = [
        [point[f"{side}_{joint}"] for joint in ("hip", "knee", "ankle")]
        for side in ("right", "left")
    ]
    part = raster.window(painter.canvas.shape, np.concatenate(legs), 32)
    positions = raster.grid(part)
    right, left = (_chain(positions, leg, (31, 22, 14)) for leg in legs)
    hips = _chain(positions, [legs[0][0], legs[1][0]], (31, 31))
    trousers = raster.union(raster.union(right, hips, 10), left, 10)
    painter.shade(part, trousers, _TROUSERS, bevel=32)


def _paint_torso(painter: _Painter, point: dict[str, Array]) -> None:
    right, left = point["right_shoulder"], point["left_shoulder"]
    neck = (left + right) / 2
    for side in ("right", "left"):
        painter.limb([point[f"{side}_shoulder"], point[f"{side}_elbow"]], (18, 14), _SKIN)
    painter.limb([neck + _xy(0, 8), neck - _xy(0, 44)], (21, 19), _SKIN)
    corners = np.stack(
        (
            neck + _xy(-26, -16),
            neck + _xy(26, -16),
            left + _xy(2, 6),
            point["left_hip"] + _xy(4, -8),
            point["right_hip"] + _xy(-4, -8),
            right + _xy(-2, 6),
        )
    )
    sleeves = [
        [point[f"{side}_shoulder"], point[f"{side}_shoulder"] * np.float32(0.42)
         + point[f"{side}_elbow"] * np.float32(0.58)]
        for side in ("right", "left")
    ]  # fmt: skip
    part = raster.window(painter.canvas.shape, np.concatenate((corners, *sleeves)), 24)
    positions = raster.grid(part)
    shirt = raster.polygon(positions, corners, 20)
    for sleeve in sleeves:
        shirt = raster.union(shirt, _chain(positions, sleeve, (23, 20)), 16)
    painter.shade(part, shirt, _SHIRT, bevel=40)
    painter.ellipse(neck - _xy(0, 34), (22, 15), _SKIN, bevel=30)


def _paint_forearms(painter: _Painter, point: dict[str, Array]) -> None:
    for side in ("right", "left"):
        elbow, wrist = point[f"{side}_elbow"], point[f"{side}_wrist"]
        painter.limb([elbow, wrist], (14, 10), _SKIN)
        reach = (wrist - elbow) / np.linalg.norm(wrist - elbow)
        across = np.array([-reach[1], reach[0]], np.float32)
        if side == "left":
            for spread in (-0.55, -0.2, 0.15, 0.5):
                tip = wrist + 31 * (reach + across * np.float32(spread)) / np.hypot(1, spread)
                painter.limb([wrist + reach * 8, tip.astype(np.float32)], (5, 4), _SKIN)
            painter.limb([wrist, wrist - across * 15 + reach * 8], (6, 4), _SKIN)
        painter.limb([wrist, wrist + reach * np.float32(12)], (11, 11), _SKIN)


def _paint_head(painter: _Painter, point: dict[str, Array]) -> None:
    face = (point["left_ear"] + point["right_ear"]) / 2
    painter.ellipse(face - _xy(0, 15), (37, 44), _HAIR, bevel=30)
    for side in ("left", "right"):
        painter.ellipse(point[f"{side}_ear"], (7, 11), _SKIN, bevel=7)
    painter.ellipse(face + _xy(0, 2), (31, 42), _SKIN, bevel=34)
    painter.ellipse(face - _xy(0, 14), (33, 36), _HAIR, bevel=30, above=float(face[1] - 22))
    for side in ("left", "right"):
        eye = point[f"{side}_eye"]
        painter.ellipse(eye, (6.5, 4), (248, 244, 240))
        painter.ellipse(eye, (3.2, 3.4), _INK)
        brow = eye - _xy(0, 10)
        painter.limb([brow - _xy(7, -1), brow + _xy(7, 1)], (1.6, 1.6), _HAIR)
    nose = point["nose"]
    painter.limb([nose - _xy(0, 10), nose], (2.5, 5), (228, 166, 136))
    mouth = nose + _xy(0, 17)
    smile = [mouth + _xy(*xy) for xy in ((-9, -2), (-4, 1.5), (4, 1.5), (9, -2))]
    painter.limb(smile, (1.2, 2, 2, 1.2), (150, 58, 58))
