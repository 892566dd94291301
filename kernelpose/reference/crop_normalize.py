"""Boxes to normalised crops, in plain PyTorch: the geometry, the warp, what the op computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def crop_normalize(
    images: Sequence[Tensor],
    boxes: Tensor,
    image_index: Tensor,
    rotation: Tensor | None,
    size: tuple[int, int],
    padding: float = 1.25,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    udp: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Crops (P, 3, h, w), centers (P, 2), scales (P, 2); see `kernelpose.ops.crop_normalize`.

    Without a branch on a value, so that nothing waits for a GPU: a person that `is_usable` rejects
    is cropped somewhere else, and blackened.
    """
    center, scale = box_to_center_scale(boxes, size, padding=padding)
    usable = is_usable(boxes, center, scale, image_index, len(images), rotation)
    matrices = warp_matrix(
        torch.where(usable[:, None], center, 0.0),
        torch.where(usable[:, None], scale, 1.0),
        size,
        rotation=0.0 if rotation is None else torch.where(usable, rotation, 0.0),
        udp=udp,
    )
    crops = _crop(images, torch.where(usable, image_index, 0), matrices, size)
    crops = torch.where(usable[:, None, None, None], crops, 0)
    return normalize(crops, mean, std).to(dtype), center, scale


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


def is_usable(
    boxes: Tensor,
    center: Tensor,
    scale: Tensor,
    image_index: Tensor,
    images: int,
    rotation: Tensor | None,
) -> Tensor:
    """Whether each person has a crop, (P,) bool: a box with an area that `can_be_cropped`, one of
    the images, and a finite rotation."""
    usable = can_be_cropped(center, scale) & (boxes[:, 2:] > 0).all(-1)
    usable &= (image_index >= 0) & (image_index < images)
    return usable if rotation is None else usable & rotation.isfinite()


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
    matrices = matrices.to(image.device)
    first = torch.zeros(len(matrices), dtype=torch.int64, device=image.device)
    return _crop([image], first, matrices, output_size)


def normalize(
    crops: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """uint8 (N, C, h, w) to float32: ``(crops / 255 - mean) / std``, a number a channel."""
    mean_, std_ = (torch.tensor(v, device=crops.device).view(-1, 1, 1) for v in (mean, std))
    return (crops.float() / 255 - mean_) / std_


def _crop(
    images: Sequence[Tensor], image_index: Tensor, matrices: Tensor, output_size: tuple[int, int]
) -> Tensor:
    """`crop_image` of image `image_index` for each of the matrices."""
    # One black pixel all around: whatever lies outside is clamped onto it.
    padded = [F.pad(image, (0, 0, 1, 1, 1, 1)) for image in images]
    sizes = torch.tensor([[*p.shape[:2]] for p in padded], device=matrices.device).view(-1, 2)
    height, width = sizes[image_index, :, None, None].unbind(1)
    first = (sizes.prod(1).cumsum(0) - sizes.prod(1))[image_index, None, None]
    flat = torch.cat([p.flatten(0, 1) for p in padded])

    x, y = _source_coordinates(matrices, output_size)
    left, top = x.floor(), y.floor()
    along, down = (x - left)[..., None], (y - top)[..., None]

    def pixels(dx: int, dy: int) -> Tensor:
        column = (left + 1 + dx).clamp(min=0).minimum(width - 1).long()
        row = (top + 1 + dy).clamp(min=0).minimum(height - 1).long()
        return flat[first + row * width + column].float()

    upper, lower = (torch.lerp(pixels(0, dy), pixels(1, dy), along) for dy in (0, 1))
    crops = torch.lerp(upper, lower, down).round_().clamp_(0, 255).to(torch.uint8)
    return crops.permute(0, 3, 1, 2).contiguous()


def _source_coordinates(matrices: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The image point under each output pixel: x and y, each (N, height, width) float32."""
    (a, b, tx), (c, d, ty) = matrices.float().double().permute(1, 2, 0)[..., None, None]
    factor = 1 / (a * d - b * c)
    a, b, c, d = d * factor, -b * factor, -c * factor, a * factor
    tx, ty = -a * tx - b * ty, -c * tx - d * ty
    a, b, tx, c, d, ty = (v.float() for v in (a, b, tx, c, d, ty))
    height, width = size
    columns = torch.arange(width, device=matrices.device, dtype=torch.float32)
    rows = torch.arange(height, device=matrices.device, dtype=torch.float32)[:, None]
    return columns * a + (rows * b + tx), columns * c + (rows * d + ty)
