"""From heatmaps to keypoints, in plain PyTorch: arg-max, then a refinement found in the field."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

DECODE_MODES = ("mmpose1", "mmpose0", "transformers", "dark", "shift", "argmax")


def decode_heatmap(
    heatmaps: Tensor,
    centers: Tensor | None = None,
    scales: Tensor | None = None,
    mode: str = "mmpose1",
    kernel: int = 11,
    udp: bool = True,
) -> tuple[Tensor, Tensor]:
    """Keypoints (P, K, 2) and scores (P, K), float32; see `kernelpose.ops.decode_heatmap`."""
    locations, scores = locate(heatmaps.float(), mode, kernel)
    if centers is None or scales is None:
        return locations, scores
    size = (heatmaps.shape[2], heatmaps.shape[3])
    return heatmap_to_image(locations, centers, scales, size, udp=udp), scores


def locate(heatmaps: Tensor, mode: str, kernel: int) -> tuple[Tensor, Tensor]:
    """Peaks (P, K, 2) of maps (P, K, h, w) in heatmap pixels and scores, in the maps' own dtype."""
    width = heatmaps.shape[-1]
    scores, index = heatmaps.flatten(2).max(-1)  # of equal maxima the first
    x, y = index % width, torch.div(index, width, rounding_mode="floor")
    offset = _REFINE[mode](heatmaps, x, y, blur_weights(mode, kernel))
    offset = torch.where(offset.isfinite(), offset, torch.zeros_like(offset))
    locations = torch.stack((x, y), -1) + offset
    present = (scores > 0) & scores.isfinite()
    locations = torch.where(present[..., None], locations, -1.0)
    return locations, torch.where(scores.isfinite(), scores, 0.0)


def heatmap_to_image(
    points: Tensor, center: Tensor, scale: Tensor, heatmap_size: tuple[int, int], *, udp: bool
) -> Tensor:
    """Heatmap pixels (B, K, 2) to image pixels.

    Args:
        points: (B, K, 2) x, y in heatmap pixels.
        center, scale: (B, 2) of the crop, in image pixels; scale is (width, height).
        heatmap_size: (height, width).
        udp: whether ``scale`` spans pixel centres (``size - 1``) or cells (``size``).
    """
    size = torch.tensor(heatmap_size[::-1], device=points.device, dtype=points.dtype)
    center, scale = center.to(points), scale.to(points)
    unit = scale / (size - 1 if udp else size)
    return points * unit[:, None] + (center - scale / 2)[:, None]


_Refinement = Callable[[Tensor, Tensor, Tensor, tuple[float, ...]], Tensor]


def _neighbours(maps: Tensor, x: Tensor, y: Tensor) -> Callable[[int, int], Tensor]:
    """A reader of the value ``dx, dy`` away from each joint's x, y, edges repeated.

    Indices stay 64-bit integers: a float32 product of person, joint and pixel is no longer exact
    from some 300 persons on.
    """
    flat = maps.flatten(2)
    height, width = maps.shape[-2:]

    def at(dx: int, dy: int) -> Tensor:
        index = (y + dy).clamp(0, height - 1) * width + (x + dx).clamp(0, width - 1)
        return flat.gather(-1, index[..., None])[..., 0]

    return at


def _no_refinement(heatmaps: Tensor, x: Tensor, y: Tensor, weights: tuple[float, ...]) -> Tensor:
    return heatmaps.new_zeros(*x.shape, 2)


def _shift_refinement(heatmaps: Tensor, x: Tensor, y: Tensor, weights: tuple[float, ...]) -> Tensor:
    height, width = heatmaps.shape[-2:]
    at = _neighbours(heatmaps, x, y)
    # The bounds are mmpose's, off by one on the low side.
    in_x = (x > 1) & (x < width - 1) & (y > 0)
    in_y = (y > 1) & (y < height - 1) & (x > 0)
    dx = torch.sign(at(1, 0) - at(-1, 0)) * in_x
    dy = torch.sign(at(0, 1) - at(0, -1)) * in_y
    return torch.stack((dx, dy), -1) * 0.25


def _dark_refinement(heatmaps: Tensor, x: Tensor, y: Tensor, weights: tuple[float, ...]) -> Tensor:
    height, width = heatmaps.shape[-2:]
    blurred = _rescaled(_blur(heatmaps, weights, _pad_zeros), heatmaps)
    at = _neighbours(blurred.clamp(min=1e-10).log(), x, y)
    dx = 0.5 * (at(1, 0) - at(-1, 0))
    dy = 0.5 * (at(0, 1) - at(0, -1))
    dxx = 0.25 * (at(2, 0) - 2 * at(0, 0) + at(-2, 0))
    dyy = 0.25 * (at(0, 2) - 2 * at(0, 0) + at(0, -2))
    dxy = 0.25 * (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1))
    inside = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2)
    step = _newton_step(dx, dy, dxx, dxy, dyy, damping=0.0)
    return torch.where(inside[..., None], step, torch.zeros_like(step))


def _udp_refinement(blurred: Tensor, x: Tensor, y: Tensor) -> Tensor:
    at = _neighbours(blurred.clamp(1e-3, 50.0).log(), x, y)
    dx = 0.5 * (at(1, 0) - at(-1, 0))
    dy = 0.5 * (at(0, 1) - at(0, -1))
    dxx = at(1, 0) - 2 * at(0, 0) + at(-1, 0)
    dyy = at(0, 1) - 2 * at(0, 0) + at(0, -1)
    dxy = 0.5 * (at(1, 1) - at(1, 0) - at(0, 1) + 2 * at(0, 0) - at(-1, 0) - at(0, -1) + at(-1, -1))
    return _newton_step(dx, dy, dxx, dxy, dyy, damping=torch.finfo(torch.float32).eps)


def _mmpose1_refinement(
    heatmaps: Tensor, x: Tensor, y: Tensor, weights: tuple[float, ...]
) -> Tensor:
    blurred = _blur(heatmaps, weights, _pad_zeros)
    return _udp_refinement(_rescaled(blurred, heatmaps), x, y)


def _mmpose0_refinement(
    heatmaps: Tensor, x: Tensor, y: Tensor, weights: tuple[float, ...]
) -> Tensor:
    return _udp_refinement(_blur(heatmaps, weights, _pad_mirrored), x, y)


def _transformers_refinement(
    heatmaps: Tensor, x: Tensor, y: Tensor, weights: tuple[float, ...]
) -> Tensor:
    return _udp_refinement(_blur(heatmaps, weights, _pad_symmetric), x, y)


def _newton_step(
    dx: Tensor, dy: Tensor, dxx: Tensor, dxy: Tensor, dyy: Tensor, *, damping: float
) -> Tensor:
    """-H^-1 g in float64, as numpy does it: a flat peak is nearly singular."""
    dtype = dx.dtype
    dx, dy, dxx, dxy, dyy = (value.double() for value in (dx, dy, dxx, dxy, dyy))
    dxx, dyy = dxx + damping, dyy + damping
    determinant = dxx * dyy - dxy * dxy
    step = torch.stack((dxy * dy - dyy * dx, dxy * dx - dxx * dy), -1)
    return (step / determinant[..., None]).to(dtype)


def blur_weights(mode: str, kernel: int) -> tuple[float, ...]:
    """The blur's factors along an axis; one for the modes that do not blur."""
    if mode in ("shift", "argmax"):
        return (1.0,)
    # OpenCV takes fixed tables for small kernels, and else derives sigma from the width.
    if mode != "transformers" and kernel in _BINOMIAL:
        return _BINOMIAL[kernel]
    sigma = 0.8 if mode == "transformers" else 0.3 * ((kernel - 1) * 0.5 - 1) + 0.8
    radius = kernel // 2
    values = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(-radius, radius + 1)]
    return tuple(value / sum(values) for value in values)


_BINOMIAL = {
    1: (1.0,),
    3: (0.25, 0.5, 0.25),
    5: (0.0625, 0.25, 0.375, 0.25, 0.0625),
    7: (0.03125, 0.109375, 0.21875, 0.28125, 0.21875, 0.109375, 0.03125),
}


def _blur(
    heatmaps: Tensor, weights: tuple[float, ...], pad: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """One axis after the other; not by convolutions, which a GPU may compute in TF32."""
    maps = pad(heatmaps, len(weights) // 2)
    for dim in (-1, -2):
        length = maps.shape[dim] - len(weights) + 1
        blurred = maps.narrow(dim, 0, length) * weights[0]
        for start, weight in enumerate(weights[1:], 1):
            blurred.add_(maps.narrow(dim, start, length), alpha=weight)
        maps = blurred
    return maps


def _rescaled(blurred: Tensor, heatmaps: Tensor) -> Tensor:
    return blurred * (heatmaps.amax((-2, -1), True) / blurred.amax((-2, -1), True))


def _pad_zeros(maps: Tensor, radius: int) -> Tensor:
    return F.pad(maps, (radius,) * 4)


def _pad_mirrored(maps: Tensor, radius: int) -> Tensor:
    """gfedcb|abcdefgh|gfedcba, for maps smaller than the radius too."""
    return _pad_by_index(maps, radius, lambda i, n: (n - 1) - ((i % (2 * n - 2)) - (n - 1)).abs())


def _pad_symmetric(maps: Tensor, radius: int) -> Tensor:
    """dcba|abcdefgh|hgfe, for maps smaller than the radius too."""
    return _pad_by_index(maps, radius, lambda i, n: torch.minimum(i % (2 * n), -(i + 1) % (2 * n)))


def _pad_by_index(maps: Tensor, radius: int, source: Callable[[Tensor, int], Tensor]) -> Tensor:
    for dim in (-2, -1):
        length = maps.shape[dim]
        index = torch.arange(-radius, length + radius, device=maps.device)
        index = source(index, length) if length > 1 else torch.zeros_like(index)
        maps = maps.index_select(dim, index)
    return maps


_REFINE: dict[str, _Refinement] = {
    "mmpose1": _mmpose1_refinement,
    "mmpose0": _mmpose0_refinement,
    "transformers": _transformers_refinement,
    "dark": _dark_refinement,
    "shift": _shift_refinement,
    "argmax": _no_refinement,
}
