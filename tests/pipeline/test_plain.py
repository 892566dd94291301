"""The plain path computes what ours does: else a race against it would mean nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernelpose.codecs import decode_heatmap, decode_simcc, flip_merge, heatmap_to_image
from kernelpose.data.boxes import warp_matrix
from kernelpose.data.crop import IMAGENET_MEAN, IMAGENET_STD, crop_image, normalize
from kernelpose.data.images import read_image
from kernelpose.pipeline import plain

Golden = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    with np.load(shared / "golden" / "codecs.npz") as file:
        return dict(file)


@pytest.mark.parametrize("mode", ["mmpose1", "transformers", "shift"])
def test_decoding(golden: Golden, mode: str) -> None:
    heatmaps = golden["heatmaps"]
    locations, scores = getattr(plain, f"decode_{mode}")(heatmaps)
    ours, our_scores = (x.numpy() for x in decode_heatmap(torch.from_numpy(heatmaps), mode=mode))
    np.testing.assert_allclose(locations[scores > 0], ours[scores > 0], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(scores, np.maximum(our_scores, scores))
    center, scale = np.full((4, 2), 100.0), np.full((4, 2), 50.0)
    image_points = plain.to_image(ours, center, scale, (64, 48))
    expected = heatmap_to_image(
        *(torch.from_numpy(x) for x in (ours, center, scale)), (64, 48), udp=True
    )
    np.testing.assert_allclose(image_points, expected.numpy(), rtol=1e-6)


def test_simcc(golden: Golden) -> None:
    logits = golden["simcc_gaussian.logits_x"], golden["simcc_gaussian.logits_y"]
    ours = decode_simcc(*(torch.from_numpy(x) for x in logits))
    for plainly, expected in zip(plain.decode_simcc(*logits), ours, strict=True):
        np.testing.assert_array_equal(plainly, expected.numpy())


def test_flip(golden: Golden) -> None:
    heatmaps = golden["heatmaps"]
    pairs = [(1, 2), (3, 4), (15, 16)]
    for shift in (False, True):
        ours = flip_merge(
            torch.from_numpy(heatmaps), torch.from_numpy(heatmaps[::-1].copy()), pairs, shift=shift
        )
        merged = plain.flip_merge(heatmaps, heatmaps[::-1], pairs, shift=shift)
        np.testing.assert_allclose(merged, ours.numpy(), rtol=0, atol=1e-7)


def test_targets(golden: Golden) -> None:
    targets, weights = plain.udp_targets(
        golden["keypoints"], golden["visible"], input_size=(256, 192), heatmap_size=(64, 48)
    )
    np.testing.assert_allclose(targets, golden["udp_sigma2.target"], rtol=0, atol=2e-6)
    np.testing.assert_array_equal(weights, golden["udp_sigma2.weight"])


def test_crops_differ_by_a_grey_level_at_most(shared: Path) -> None:
    with np.load(shared / "golden" / "topdown_coco.npz") as persons:
        center, scale = (torch.from_numpy(persons[name][:4]) for name in ("center", "scale_px_wh"))
        file = persons["image_file"][0]
    image = read_image(shared / "samples/coco/val2017" / file)
    matrices = warp_matrix(center, scale, (256, 192))
    crops = plain.crop_and_normalize(
        image, matrices.numpy(), (256, 192), IMAGENET_MEAN, IMAGENET_STD
    )
    ours = normalize(crop_image(torch.from_numpy(image), matrices, (256, 192))).numpy()
    levels = np.abs(crops - ours) * 255 * np.array(IMAGENET_STD)[:, None, None]
    assert levels.max() < 1.001
    assert (levels > 1e-2).mean() < 1e-3
