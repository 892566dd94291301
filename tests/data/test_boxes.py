"""Centers, scales and affine maps against mmpose 1.3.2, and by what they must do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kernelpose.data.boxes import box_to_center_scale, can_be_cropped, warp_matrix


def test_center_and_scale_of_real_boxes(shared: Path) -> None:
    with np.load(shared / "golden" / "topdown_coco.npz") as golden:
        boxes = torch.from_numpy(golden["box_xywh"])
        center, scale = box_to_center_scale(boxes, (256, 192))
        assert np.array_equal(center.numpy(), golden["center"])
        assert np.array_equal(scale.numpy(), golden["scale_px_wh"])


@pytest.mark.parametrize(("name", "udp"), [("udp", True), ("plain", False)])
def test_warp_matrices(shared: Path, name: str, udp: bool) -> None:
    with np.load(shared / "golden" / "warps.npz") as golden:
        matrices = warp_matrix(
            torch.from_numpy(golden["center"]),
            torch.from_numpy(golden["scale_px_wh"]),
            (256, 192),
            rotation=torch.from_numpy(golden["rotation_deg"]),
            udp=udp,
        )
        # Upstream rounds to float32 on the way; 5e-4 of a pixel at 500 pixels from the origin.
        for center in ([0.0, 0.0, 1.0], [500.0, 400.0, 1.0]):
            expected = golden[name].astype(np.float64) @ center
            np.testing.assert_allclose(matrices.numpy() @ center, expected, rtol=0, atol=5e-4)


def test_keypoints_in_the_crop(shared: Path) -> None:
    with np.load(shared / "golden" / "topdown_coco.npz") as golden:
        path = shared / "samples/coco/annotations/person_keypoints_val2017.json"
        annotations = json.loads(path.read_text())["annotations"]
        by_box = {tuple(a["bbox"]): np.array(a["keypoints"]).reshape(17, 3) for a in annotations}
        boxes = golden["box_xywh"]
        keypoints = np.stack([by_box[tuple(box)] for box in boxes])
        center, scale = box_to_center_scale(torch.from_numpy(boxes), (256, 192))
        matrices = warp_matrix(center, scale, (256, 192)).numpy()
        points = np.einsum("nij,nkj->nki", matrices[:, :, :2], keypoints[..., :2])
        points += matrices[:, None, :, 2]
        labelled = keypoints[..., 2] > 0
        expected = golden["keypoints_in_crop"]
        np.testing.assert_allclose(points[labelled], expected[labelled], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("width", "height"), [(100, 300), (300, 100), (90, 120)])
def test_crop_holds_the_padded_box_at_the_inputs_aspect(width: int, height: int) -> None:
    center, scale = box_to_center_scale(torch.tensor([[10, 20, width, height]]), (256, 192))
    assert center.tolist() == [[10 + width / 2, 20 + height / 2]]
    assert scale[0, 0] / scale[0, 1] == pytest.approx(0.75)
    assert (scale[0] >= 1.25 * torch.tensor([width, height]) - 1e-3).all()
    assert min(scale[0, 0] / width, scale[0, 1] / height) == pytest.approx(1.25)


@pytest.mark.parametrize("udp", [True, False])
def test_corners_of_the_crop(udp: bool) -> None:
    center, scale = torch.tensor([[50.0, 80.0]]), torch.tensor([[30.0, 40.0]])
    matrix = warp_matrix(center, scale, (256, 192), udp=udp)[0]
    last = torch.tensor([191.0, 255.0] if udp else [192.0, 256.0], dtype=torch.float64)
    corner = torch.tensor([65.0, 100.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(matrix @ corner, last)
    middle = torch.tensor([50.0, 80.0, 1.0], dtype=torch.float64)
    turned = warp_matrix(center, scale, (256, 192), rotation=33.0, udp=udp)[0]
    torch.testing.assert_close(turned @ middle, last / 2)


@pytest.mark.parametrize(
    ("center", "scale", "expected"),
    [
        ((5, 5), (10, 10), True),
        ((5, 2e9), (10, 10), False),
        ((-2e9, 5), (10, 10), False),
        ((5, 5), (10, 2e9), False),
        ((5, 5), (1e-7, 10), False),
        ((float("nan"), 5), (10, 10), False),
        ((5, 5), (10, float("nan")), False),
    ],
)
def test_what_float32_can_crop(center, scale, expected: bool) -> None:
    crop = torch.tensor([center], dtype=torch.float32), torch.tensor([scale], dtype=torch.float32)
    assert can_be_cropped(*crop).tolist() == [expected]


def test_no_boxes_and_wrong_boxes() -> None:
    center, scale = box_to_center_scale(torch.zeros(0, 4), (256, 192))
    assert warp_matrix(center, scale, (256, 192)).shape == (0, 2, 3)
    with pytest.raises(ValueError, match=r"boxes has shape \(4,\); expected \(N, 4\)"):
        box_to_center_scale(torch.zeros(4), (256, 192))
