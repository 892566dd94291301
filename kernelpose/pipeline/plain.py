"""What users have otherwise: crops, targets and decoding with OpenCV, scipy and numpy.

The yardstick of `kernelpose bench pipeline` and of the benchmarks, and nothing else. The work is
split as the usual libraries split it: mmpose crops, draws targets and decodes one person at a time,
transformers blurs one map at a time; within a person everything is vectorised that they vectorise.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernelpose.errors import UserError

Floats = NDArray[np.floating[Any]]
Bytes = NDArray[np.uint8]


def _library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module} is missing ({error}); expected for the plain path: "
            "pip install kernelpose[bench]."
        ) from error


def read_image(path: Path) -> Bytes:
    """An image file as (H, W, 3) RGB."""
    cv2 = _library("cv2")
    pixels = cv2.imread(str(path))
    if pixels is None:
        raise UserError(f"{path} is not an image; expected one that OpenCV can read.")
    image: Bytes = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return image


def crop_and_normalize(
    image: Bytes,
    matrices: Floats,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> NDArray[np.float32]:
    """Crops (N, 3, h, w) of an (H, W, 3) image through matrices (N, 2, 3), a warp a person."""
    cv2 = _library("cv2")
    shift = 255 * np.array(mean, np.float64)
    factor = 1 / (255 * np.array(std, np.float64))
    crops = np.empty((len(matrices), 3, *size), np.float32)
    for crop, matrix in zip(crops, matrices, strict=True):
        warped = cv2.warpAffine(image, matrix, (size[1], size[0]), flags=cv2.INTER_LINEAR)
        pixels = warped.astype(np.float32)
        cv2.subtract(pixels, shift, pixels)
        cv2.multiply(pixels, factor, pixels)
        crop[:] = pixels.transpose(2, 0, 1)
    return crops


def flip_merge(
    heatmaps: Floats, flipped: Floats, flip_pairs: Sequence[tuple[int, int]], *, shift: bool = False
) -> Floats:
    """Mean of heatmaps (N, K, h, w) and those of the mirrored input."""
    back = flipped[..., ::-1].copy()
    for left, right in flip_pairs:
        back[:, [left, right]] = back[:, [right, left]]
    if shift:
        back[..., 1:] = back[..., :-1].copy()
    return (heatmaps + back) * 0.5


def _peaks(heatmaps: Floats) -> tuple[Floats, Floats]:
    """Arg-max (..., 2) as x, y and maximum of maps (..., h, w)."""
    flat = heatmaps.reshape(*heatmaps.shape[:-2], -1)
    index = flat.argmax(-1)
    width = heatmaps.shape[-1]
    locations = np.stack((index % width, index // width), -1).astype(np.float32)
    scores = flat.max(-1)
    locations[scores <= 0] = -1
    return locations, scores


def _newton(locations: Floats, log_maps: Floats) -> Floats:
    """UDP's step on the peaks (M, 2) of log maps (M, h, w)."""
    maps = np.pad(log_maps, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = np.arange(len(maps))
    x, y = (locations[:, axis].astype(np.int64) + 1 for axis in (0, 1))

    def at(dx: int, dy: int) -> Floats:
        values: Floats = maps[rows, y + dy, x + dx]
        return values

    gradient = 0.5 * np.stack((at(1, 0) - at(-1, 0), at(0, 1) - at(0, -1)), -1)
    dxx = at(1, 0) - 2 * at(0, 0) + at(-1, 0)
    dyy = at(0, 1) - 2 * at(0, 0) + at(0, -1)
    around = at(1, 0) + at(0, 1) + at(-1, 0) + at(0, -1)
    dxy = 0.5 * (at(1, 1) - around + 2 * at(0, 0) + at(-1, -1))
    hessian = np.stack((dxx, dxy, dxy, dyy), -1).reshape(-1, 2, 2)
    inverse = np.linalg.inv(hessian + np.finfo(np.float32).eps * np.eye(2))
    return locations - np.einsum("mij,mj->mi", inverse, gradient)


def decode_mmpose1(heatmaps: Floats, *, kernel: int = 11) -> tuple[Floats, Floats]:
    """Locations (N, K, 2) in heatmap pixels and scores (N, K), a person at a time: mmpose 1.x."""
    cv2 = _library("cv2")
    border = (kernel - 1) // 2
    height, width = heatmaps.shape[-2:]
    locations, scores = zip(*(_peaks(person) for person in heatmaps), strict=True)
    refined = []
    for person, peaks in zip(heatmaps, locations, strict=True):
        blurred = np.empty_like(person)
        for joint, heatmap in enumerate(person):
            padded = np.zeros((height + 2 * border, width + 2 * border), np.float32)
            padded[border:-border, border:-border] = heatmap
            padded = cv2.GaussianBlur(padded, (kernel, kernel), 0)
            blurred[joint] = padded[border:-border, border:-border]
            blurred[joint] *= heatmap.max() / blurred[joint].max()
        refined.append(_newton(peaks, np.log(np.clip(blurred, 1e-3, 50))))
    return np.stack(refined), np.stack(scores)


def decode_transformers(heatmaps: Floats, *, kernel: int = 11) -> tuple[Floats, Floats]:
    """Locations (N, K, 2) in heatmap pixels and scores (N, K), a blur a map, as transformers."""
    blur = _library("scipy.ndimage").gaussian_filter
    radius = (kernel - 1) // 2
    locations, scores = _peaks(heatmaps)
    maps = heatmaps.reshape(-1, *heatmaps.shape[-2:])
    blurred = np.stack([blur(heatmap, sigma=0.8, radius=radius) for heatmap in maps])
    refined = _newton(locations.reshape(-1, 2), np.log(np.clip(blurred, 1e-3, 50)))
    return refined.reshape(locations.shape), scores


def decode_shift(heatmaps: Floats) -> tuple[Floats, Floats]:
    """Locations (N, K, 2) in heatmap pixels and scores (N, K), a shift a joint, as mmpose."""
    height, width = heatmaps.shape[-2:]
    locations, scores = _peaks(heatmaps)
    for person, joint in np.ndindex(scores.shape):
        heatmap, location = heatmaps[person, joint], locations[person, joint]
        x, y = int(location[0]), int(location[1])
        if 1 < x < width - 1 and 0 < y < height:
            location[0] += 0.25 * np.sign(heatmap[y, x + 1] - heatmap[y, x - 1])
        if 1 < y < height - 1 and 0 < x < width:
            location[1] += 0.25 * np.sign(heatmap[y + 1, x] - heatmap[y - 1, x])
    return locations, scores


def decode_simcc(x: Floats, y: Floats, *, split_ratio: float = 2.0) -> tuple[Floats, Floats]:
    """Input pixels (N, K, 2) and scores (N, K) of logits (N, K, bins), a person at a time."""
    points, scores = [], []
    for logits_x, logits_y in zip(x, y, strict=True):
        location = np.stack((logits_x.argmax(1), logits_y.argmax(1)), -1).astype(np.float32)
        score = np.minimum(logits_x.max(1), logits_y.max(1))
        location[score <= 0] = -1
        points.append(location / split_ratio)
        scores.append(score)
    return np.stack(points), np.stack(scores)


def to_image(
    locations: Floats, centers: Floats, scales: Floats, heatmap_size: tuple[int, int]
) -> Floats:
    """Heatmap pixels (N, K, 2) to image pixels, under UDP."""
    unit = scales / (np.array(heatmap_size[::-1]) - 1)
    return locations * unit[:, None] + (centers - scales / 2)[:, None]


def udp_targets(
    keypoints: Floats,
    visible: Floats,
    *,
    input_size: tuple[int, int],
    heatmap_size: tuple[int, int],
    sigma: float = 2.0,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """UDP targets (N, K, h, w) and weights (N, K), a joint at a time, as mmpose."""
    height, width = heatmap_size
    ratio = (np.array(input_size[::-1]) - 1.0) / (np.array(heatmap_size[::-1]) - 1.0)
    targets = np.zeros((*keypoints.shape[:2], height, width), np.float32)
    weights = visible.astype(np.float32)
    radius = 3 * sigma
    columns = np.arange(2 * radius + 1, dtype=np.float32)
    rows = columns[:, None]
    for person, joint in np.ndindex(keypoints.shape[:2]):
        if visible[person, joint] < 0.5:
            continue
        center = keypoints[person, joint] / ratio
        middle = (center + 0.5).astype(np.int64)
        left, top = (middle - radius).astype(np.int64)
        right, bottom = (middle + radius + 1).astype(np.int64)
        if left >= width or top >= height or right < 0 or bottom < 0:
            weights[person, joint] = 0
            continue
        x0, y0 = radius + center - middle
        gaussian = np.exp(-((columns - x0) ** 2 + (rows - y0) ** 2) / (2 * sigma**2))
        here = np.s_[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
        there = np.s_[
            max(-top, 0) : min(bottom, height) - top, max(-left, 0) : min(right, width) - left
        ]
        targets[person, joint][here] = gaussian[there]
    return targets, weights
