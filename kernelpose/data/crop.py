"""Crops of an image through affine maps, and their normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def crop_image(image: Tensor, matrices: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Bilinear crops, rounded to uint8; black outside the image.

    The arithmetic (matrix read as float32, inverted in float64, applied in float32) is that of
    ``cv2.warpAffine`` with INTER_LINEAR from OpenCV 4.11 on; earlier ones round coordinates to
    1/32 pixel, which moves a grey value at an edge by a few levels.

    Args:
        image: (H, W, C) uint8.
        matrices: (N, 2, 3), image to output pixels.
        output_size: (height, width).

    Returns:
        (N, C, height, width) uint8 on the image's device.
    """
    if image.dim() != 3 or image.dtype != torch.uint8 or 0 in image.shape:
        raise ValueError(
            f"image is {image.dtype} {tuple(image.shape)}; expected a non-empty (H, W, C) uint8 "
            "tensor."
        )
    if matrices.dim() != 3 or matrices.shape[1:] != (2, 3):
        raise ValueError(f"matrices has shape {tuple(matrices.shape)}; expected (N, 2, 3).")
    x, y = _source_coordinates(matrices.to(image.device), output_size)
    left, top = x.floor(), y.floor()
    along, down = (x - left)[..., None], (y - top)[..., None]
    height, width, channels = image.shape
    # One black pixel all around: whatever lies outside is clamped onto it.
    padded = F.pad(image, (0, 0, 1, 1, 1, 1)).view(-1, channels)
    columns = [(left + 1 + i).clamp(0, width + 1).long() for i in (0, 1)]
    rows = [(top + 1 + i).clamp(0, height + 1).long() * (width + 2) for i in (0, 1)]

    def pixels(row: Tensor, column: Tensor) -> Tensor:
        return padded[(row + column).flatten()].view(*x.shape, channels).float()

    upper, lower = (
        torch.lerp(pixels(row, columns[0]), pixels(row, columns[1]), along) for row in rows
    )
    crops = torch.lerp(upper, lower, down).round_().clamp_(0, 255).to(torch.uint8)
    return crops.permute(0, 3, 1, 2).contiguous()


def normalize(crops: Tensor) -> Tensor:
    """uint8 RGB (N, 3, h, w) to float32 with ImageNet's mean and standard deviation."""
    mean = torch.tensor(IMAGENET_MEAN, device=crops.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=crops.device).view(3, 1, 1)
    return (crops.float() / 255 - mean) / std


def _source_coordinates(matrices: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The image point under each output pixel: x and y, each (N, height, width) float32."""
    linear, offset = matrices.float().double().split((2, 1), -1)
    inverse = torch.linalg.inv(linear)
    (a, b), (c, d) = inverse.float().permute(1, 2, 0)[..., None, None]
    tx, ty = (-inverse @ offset).float().squeeze(-1).unbind(-1)
    height, width = size
    columns = torch.arange(width, device=matrices.device, dtype=torch.float32)
    rows = torch.arange(height, device=matrices.device, dtype=torch.float32)[:, None]
    x = columns * a + (rows * b + tx[:, None, None])
    y = columns * c + (rows * d + ty[:, None, None])
    return x, y
