"""Crops against OpenCV's, and by what interpolation means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kernelpose.data.boxes import warp_matrix
from kernelpose.data.crop import crop_image, normalize
from kernelpose.data.images import read_image


def shift(x: float, y: float) -> torch.Tensor:
    return torch.tensor([[[1.0, 0.0, x], [0.0, 1.0, y]]])


def random_image(height: int, width: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (height, width, channels), generator=generator).to(torch.uint8)


def test_photographs_crop_as_in_opencv(shared: Path) -> None:
    with np.load(shared / "golden" / "topdown_coco.npz") as golden:
        crops = golden["crop_bgr_uint8"]
        center, scale = (torch.from_numpy(golden[name]) for name in ("center", "scale_px_wh"))
        files = golden["image_file"]
    for person, expected in enumerate(crops):
        image = torch.from_numpy(read_image(shared / "samples/coco/val2017" / files[person]))
        matrix = warp_matrix(center[[person]], scale[[person]], (256, 192))
        crop = crop_image(image, matrix, (256, 192))[0].permute(1, 2, 0).numpy()[..., ::-1]
        difference = np.abs(crop.astype(int) - expected.astype(int))
        assert difference.max() <= 1
        assert (difference > 0).mean() <= 1e-3


def test_identity_and_whole_shifts_copy_pixels() -> None:
    image = random_image(7, 9, channels=4)
    planes = image.permute(2, 0, 1)
    assert torch.equal(crop_image(image, shift(0, 0), (7, 9))[0], planes)
    moved = crop_image(image, shift(-2, -3), (7, 9))[0]
    assert torch.equal(moved[:, :4, :7], planes[:, 3:, 2:])
    assert not moved[:, 4:].any()
    assert not moved[:, :, 7:].any()


def test_half_a_pixel_is_the_mean_and_the_outside_is_black() -> None:
    image = torch.tensor([[[10], [20], [41]]], dtype=torch.uint8)
    crop = crop_image(image, shift(0.5, 0), (1, 5))[0, 0, 0]
    assert crop.tolist() == [5, 15, 30, 20, 0]  # half to even: 30.5 -> 30, 20.5 -> 20
    assert not crop_image(image, shift(1e6, -1e6), (4, 4)).any()


def test_each_matrix_makes_its_own_crop() -> None:
    image = random_image(20, 16)
    center = torch.tensor([[3.0, 4.0], [8.0, 8.0], [14.0, 19.0]])
    scale = torch.tensor([[9.0, 12.0], [18.0, 24.0], [3.0, 4.0]])
    matrices = warp_matrix(center, scale, (16, 12), rotation=torch.tensor([0.0, 20.0, -70.0]))
    together = crop_image(image, matrices, (16, 12))
    assert together.shape == (3, 3, 16, 12)
    for i in range(3):
        assert torch.equal(together[i], crop_image(image, matrices[[i]], (16, 12))[0])
    assert crop_image(image, matrices[:0], (16, 12)).shape == (0, 3, 16, 12)


def test_a_view_crops_like_its_copy() -> None:
    image = random_image(20, 16).transpose(0, 1)
    matrix = shift(0.3, 0.4)
    expected = crop_image(image.contiguous(), matrix, (8, 8))
    assert torch.equal(crop_image(image, matrix, (8, 8)), expected)


def test_normalize() -> None:
    crops = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    expected = torch.tensor([[-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225],
                             [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]])  # fmt: skip
    torch.testing.assert_close(normalize(crops)[..., 0, 0], expected)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"image is torch.float32 \(4, 4, 3\); expected .* uint8"):
        crop_image(torch.zeros(4, 4, 3), shift(0, 0), (4, 4))
    with pytest.raises(ValueError, match=r"\(0, 4, 3\); expected a non-empty"):
        crop_image(torch.zeros(0, 4, 3, dtype=torch.uint8), shift(0, 0), (4, 4))
    with pytest.raises(ValueError, match=r"matrices has shape \(2, 3\); expected \(N, 2, 3\)"):
        crop_image(random_image(4, 4), shift(0, 0)[0], (4, 4))
