"""crop_normalize on pictures of 640 x 480 to the inputs of 256 x 192 models."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.forward import Compare
from benchmarks.setup import parameters
from kernelpose.data.boxes import box_to_center_scale, warp_matrix
from kernelpose.pipeline import plain
from kernelpose.reference.crop_normalize import IMAGENET_MEAN, IMAGENET_STD
from tests.ops.test_crop_normalize import check

HEIGHT, WIDTH, IMAGES = 480, 640, 8
# size of the crops
CASES = {"crop 256x192": ((256, 192), (1, 64)), "crop 384x288": ((384, 288), (64,))}


def _plain(
    images: Tensor, boxes: Tensor, image_index: Tensor, *, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Image by image, person by person."""
    centers, scales = box_to_center_scale(boxes, size)
    matrices = warp_matrix(centers, scales, size).numpy()
    crops = torch.empty(len(boxes), 3, *size)
    for i, image in enumerate(images.numpy()):
        here = (image_index == i).numpy()
        crops.numpy()[here] = plain.crop_and_normalize(
            image, matrices[here], size, IMAGENET_MEAN, IMAGENET_STD
        )
    return crops, centers, scales


@pytest.mark.parametrize(("size", "batch", "dtype"), parameters(CASES))
def bench_crop_normalize(
    size: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compare: Compare,
) -> None:
    def inputs() -> list[Tensor]:
        """Persons of a quarter to the whole height, on pictures about as smooth as photographs."""
        count = min(batch, IMAGES)
        coarse = 255 * torch.rand(count, 3, HEIGHT // 8, WIDTH // 8)
        images = F.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear").byte()
        images = images.permute(0, 2, 3, 1).contiguous()
        x, y, h, aspect = torch.rand(4, batch, dtype=torch.float64)
        h = HEIGHT * (0.25 + 0.75 * h)
        w = h * (0.3 + 0.4 * aspect)
        boxes = torch.stack((x * (WIDTH - w), y * (HEIGHT - h), w, h), -1)
        return [t.to(device) for t in (images, boxes, torch.arange(batch) % count)]

    compare(
        "crop_normalize",
        inputs,
        {"size": size, "dtype": dtype},
        functools.partial(_plain, size=size),
        bytes=batch * 3 * size[0] * size[1] * dtype.itemsize,  # pixels may come from a cache
        same=functools.partial(check, dtype=dtype, std=IMAGENET_STD),
    )
