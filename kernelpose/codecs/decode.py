"""From heatmaps to keypoints: arg-max, then one of the refinements found in the field."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

DECODE_MODES = ("mmpose1", "mmpose0", "transformers", "dark", "shift", "argmax")


def decode_heatmap(
    heatmaps: Tensor, *, mode: str = "mmpose1", blur_kernel: int = 11
) -> tuple[Tensor, Tensor]:
    """Sub-pixel peaks of heatmaps.

    ======================  ===================================================================
    mode                    refinement of the arg-max
    ======================  ===================================================================
    ``mmpose1``             UDP's Newton step on log maps blurred with zeros outside and rescaled
                            to the old maximum (mmpose 1.x)
    ``mmpose0``             the same, blurred with mirrored borders, not rescaled (mmpose 0.x,
                            official ViTPose)
    ``transformers``        the same, blurred with sigma 0.8 whatever the kernel (transformers)
    ``dark``                DARK's Newton step with differences over two pixels, on the blur of
                            ``mmpose1``; none near the border
    ``shift``               a quarter pixel towards the higher neighbour
    ``argmax``              none
    ======================  ===================================================================

    Newton step: Huang et al., "The Devil is in the Details", 2020; Zhang et al.,
    "Distribution-Aware Coordinate Representation", 2020.

    Args:
        heatmaps: (B, K, h, w), floating point; computed in float32.
        blur_kernel: odd width of the blur in pixels; 11 goes with targets of sigma 2.

    Returns:
        Locations (B, K, 2) as x, y in heatmap pixels and scores (B, K), both float32. The score
        is the maximum before the blur. A map whose maximum is not positive has no location:
        (-1, -1), in every mode. A map that holds NaN, or whose maximum is infinite, neither has
        one; its score is 0.
    """
    if heatmaps.dim() != 4 or not heatmaps.is_floating_point() or 0 in heatmaps.shape[2:]:
        raise ValueError(
            f"heatmaps is {heatmaps.dtype} {tuple(heatmaps.shape)}; expected a floating-point "
            "(B, K, h, w) tensor, h, w >= 1."
        )
    if mode not in DECODE_MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(DECODE_MODES)}.")
    if blur_kernel < 1 or blur_kernel % 2 == 0:
        raise ValueError(f"blur_kernel is {blur_kernel}; expected a positive odd number.")
    heatmaps = heatmaps.float()
    width = heatmaps.shape[-1]
    scores, index = heatmaps.flatten(2).max(-1)
    x, y = index % width, torch.div(index, width, rounding_mode="floor")
    offset = _REFINE[mode](heatmaps, x, y, blur_kernel)
    offset = torch.where(offset.isfinite(), offset, torch.zeros_like(offset))
    locations = torch.stack((x, y), -1).float() + offset
    present = (scores > 0) & scores.isfinite()
    locations = torch.where(present[..., None], locations, -1.0)
    return locations, torch.where(scores.isfinite(), scores, 0.0)


_Refinement = Callable[[Tensor, Tensor, Tensor, int], Tensor]


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


def _no_refinement(heatmaps: Tensor, x: Tensor, y: Tensor, blur_kernel: int) -> Tensor:
    return torch.zeros(*x.shape, 2, device=heatmaps.device)


def _shift_refinement(heatmaps: Tensor, x: Tensor, y: Tensor, blur_kernel: int) -> Tensor:
    height, width = heatmaps.shape[-2:]
    at = _neighbours(heatmaps, x, y)
    # The bounds are mmpose's, off by one on the low side.
    in_x = (x > 1) & (x < width - 1) & (y > 0)
    in_y = (y > 1) & (y < height - 1) & (x > 0)
    dx = torch.sign(at(1, 0) - at(-1, 0)) * in_x
    dy = torch.sign(at(0, 1) - at(0, -1)) * in_y
    return torch.stack((dx, dy), -1) * 0.25


def _dark_refinement(heatmaps: Tensor, x: Tensor, y: Tensor, blur_kernel: int) -> Tensor:
    height, width = heatmaps.shape[-2:]
    blurred = _rescaled(_blur(heatmaps, _opencv_gaussian(blur_kernel), _pad_zeros), heatmaps)
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


def _mmpose1_refinement(heatmaps: Tensor, x: Tensor, y: Tensor, blur_kernel: int) -> Tensor:
    blurred = _blur(heatmaps, _opencv_gaussian(blur_kernel), _pad_zeros)
    return _udp_refinement(_rescaled(blurred, heatmaps), x, y)


def _mmpose0_refinement(heatmaps: Tensor, x: Tensor, y: Tensor, blur_kernel: int) -> Tensor:
    return _udp_refinement(_blur(heatmaps, _opencv_gaussian(blur_kernel), _pad_mirrored), x, y)


def _transformers_refinement(heatmaps: Tensor, x: Tensor, y: Tensor, blur_kernel: int) -> Tensor:
    return _udp_refinement(_blur(heatmaps, _gaussian(blur_kernel, 0.8), _pad_symmetric), x, y)


def _newton_step(
    dx: Tensor, dy: Tensor, dxx: Tensor, dxy: Tensor, dyy: Tensor, *, damping: float
) -> Tensor:
    """-H^-1 g in float64, as numpy does it: a flat peak is nearly singular."""
    dx, dy, dxx, dxy, dyy = (value.double() for value in (dx, dy, dxx, dxy, dyy))
    dxx, dyy = dxx + damping, dyy + damping
    determinant = dxx * dyy - dxy * dxy
    step = torch.stack((dxy * dy - dyy * dx, dxy * dx - dxx * dy), -1)
    return (step / determinant[..., None]).float()


def _opencv_gaussian(kernel: int) -> list[float]:
    """OpenCV's Gaussian for a kernel width without sigma: small widths are binomial."""
    binomial = {
        1: [1.0],
        3: [0.25, 0.5, 0.25],
        5: [0.0625, 0.25, 0.375, 0.25, 0.0625],
        7: [0.03125, 0.109375, 0.21875, 0.28125, 0.21875, 0.109375, 0.03125],
    }
    return binomial.get(kernel) or _gaussian(kernel, 0.3 * ((kernel - 1) * 0.5 - 1) + 0.8)


def _gaussian(kernel: int, sigma: float) -> list[float]:
    radius = kernel // 2
    values = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(-radius, radius + 1)]
    return [value / sum(values) for value in values]


def _blur(heatmaps: Tensor, kernel: list[float], pad: Callable[[Tensor, int], Tensor]) -> Tensor:
    """One axis after the other; not by convolutions, which a GPU may compute in TF32."""
    maps = pad(heatmaps, len(kernel) // 2)
    for dim in (-1, -2):
        length = maps.shape[dim] - len(kernel) + 1
        blurred = maps.narrow(dim, 0, length) * kernel[0]
        for start, weight in enumerate(kernel[1:], 1):
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
