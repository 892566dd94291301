"""Boxes to crops: center and scale, and the affine maps into the model's input."""

from __future__ import annotations

import torch
from torch import Tensor


def box_to_center_scale(
    boxes: Tensor, input_size: tuple[int, int], *, padding: float = 1.25
) -> tuple[Tensor, Tensor]:
    """Center of each box and the size of its crop, grown to the input's aspect and padded.

    Args:
        boxes: (N, 4) as x, y, width, height in image pixels.
        input_size: (height, width) of the model's input.
        padding: factor on both sides after the aspect is fixed.

    Returns:
        center (N, 2) and scale (N, 2) as (width, height), float32, in image pixels.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(
            f"boxes has shape {tuple(boxes.shape)}; expected (N, 4), x, y, width, height."
        )
    # Corners in float64, the rest in float32: the order of mmpose, equal to the last bit.
    boxes = boxes.double()
    low, high = boxes[:, :2].float(), (boxes[:, :2] + boxes[:, 2:]).float()
    center = (high + low) * 0.5
    width, height = ((high - low) * padding).unbind(-1)
    aspect = input_size[1] / input_size[0]
    wide = width > height * aspect
    scale = torch.stack(
        (torch.where(wide, width, height * aspect), torch.where(wide, width / aspect, height)), -1
    )
    return center, scale


def can_be_cropped(center: Tensor, scale: Tensor) -> Tensor:
    """Whether float32 has room for the warp of each crop: (N,) bool.

    Crops between a millionth of a pixel and a billion pixels in size, at most that far out; false
    where anything is not finite.
    """
    size = (scale >= 1e-6) & (scale <= 1e9)
    return (size & (center.abs() <= 1e9)).all(-1)


def warp_matrix(
    center: Tensor,
    scale: Tensor,
    input_size: tuple[int, int],
    *,
    rotation: Tensor | float = 0.0,
    udp: bool = True,
) -> Tensor:
    """Affine maps from image pixels to input pixels.

    Under UDP (Huang et al., "The Devil is in the Details", 2020) the crop's sides map pixel
    centre to pixel centre, each axis by its own factor ``(size - 1) / scale``; otherwise both
    axes are scaled by ``width / scale width``.

    Args:
        center, scale: (N, 2) in image pixels; scale is (width, height).
        input_size: (height, width).
        rotation: degrees, a number or (N,), in the sense of mmpose, whose two conventions turn
            opposite ways: UDP turns the image's content clockwise, the plain one against it.

    Returns:
        (N, 2, 3) float64.
    """
    center, scale = center.double(), scale.double()
    angle = torch.deg2rad(torch.as_tensor(rotation, dtype=torch.float64, device=center.device))
    cos, sin = torch.cos(angle).expand(len(center)), torch.sin(angle).expand(len(center))
    size = torch.tensor(input_size[::-1], dtype=torch.float64, device=center.device)
    if udp:
        factor, middle = (size - 1) / scale, (size - 1) / 2
    else:
        factor, middle = (size[0] / scale[:, :1]).expand(-1, 2), size / 2
        sin = -sin
    rotate = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    linear = rotate * factor[..., None]
    translation = middle[..., None] - linear @ center[..., None]
    return torch.cat((linear, translation), -1)
