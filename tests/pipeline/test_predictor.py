"""From images and boxes to keypoints in image pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kernelpose.codecs import encode_udp
from kernelpose.data.boxes import box_to_center_scale, warp_matrix
from kernelpose.data.skeletons import COCO, Skeleton
from kernelpose.pipeline import Predictor


class Oracle(nn.Module):
    """Answers every crop with the targets of the keypoints that it was told."""

    def __init__(self, keypoints: torch.Tensor) -> None:
        super().__init__()
        self.image_size = (256, 192)
        self.keypoints = nn.Parameter(keypoints)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[1:] == (3, 256, 192)
        visible = torch.ones(self.keypoints.shape[:2])
        return encode_udp(self.keypoints, visible, input_size=(256, 192), heatmap_size=(64, 48))[0]


def test_keypoints_come_back_in_image_pixels() -> None:
    boxes = torch.tensor([[100.0, 80.0, 60.0, 150.0], [300.0, 40.0, 200.0, 90.0]])
    center, scale = box_to_center_scale(boxes, (256, 192))
    generator = torch.Generator().manual_seed(0)
    truth = boxes[:, None, :2] + boxes[:, None, 2:] * torch.rand(2, 17, 2, generator=generator)
    matrices = warp_matrix(center, scale, (256, 192)).float()
    in_crop = torch.einsum("nij,nkj->nki", matrices[:, :, :2], truth) + matrices[:, None, :, 2]
    poses = Predictor(Oracle(in_crop))(np.zeros((400, 600, 3), np.uint8), boxes)
    assert (poses.keypoints - truth).abs().max() < 0.05
    assert (poses.scores > 0.93).all()


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_batches_span_images_and_change_nothing(mosaic, pictures, batch_size: int) -> None:
    images = pictures(5)
    boxes = [
        np.array([[i, 2, 20 + i, 30 + 2 * n] for n in range(count)]).reshape(-1, 4)
        for i, count in enumerate((2, 0, 5, 1, 3))
    ]
    alone = [Predictor(mosaic)(image, box) for image, box in zip(images, boxes, strict=True)]
    mosaic.batches.clear()
    predictor = Predictor(mosaic, batch_size=batch_size)
    poses = list(predictor.stream(zip(images, boxes, strict=True)))
    assert [len(pose.keypoints) for pose in poses] == [2, 0, 5, 1, 3]
    assert mosaic.batches == [batch_size] * (11 // batch_size) + (
        [11 % batch_size] if 11 % batch_size else []
    )
    for expected, found in zip(alone, poses, strict=True):
        torch.testing.assert_close(found.keypoints, expected.keypoints)
        torch.testing.assert_close(found.scores, expected.scores)


def test_an_image_is_done_as_soon_as_its_batch_is(mosaic, pictures) -> None:
    taken = []

    def items():
        for number, image in enumerate(pictures(4)):
            taken.append(number)
            yield image, None

    stream = Predictor(mosaic, batch_size=2).stream(items())
    next(stream)
    assert taken == [0, 1]


def test_the_whole_image_is_the_box_by_default(mosaic, pictures) -> None:
    (image,) = pictures(1)
    height, width = image.shape[:2]
    whole = Predictor(mosaic)(image, [[0, 0, width, height]])
    assert torch.equal(Predictor(mosaic)(torch.from_numpy(image)).keypoints, whole.keypoints)


def test_flip_test_averages_with_the_mirror(mosaic, pictures) -> None:
    """With mirrored joints of equal weight the flip test agrees with the plain one exactly."""
    pairs = torch.tensor(COCO.flip_pairs)
    (image,) = pictures(1)
    plain = Predictor(mosaic)(image)
    uneven = Predictor(mosaic, flip_test=True)(image)
    assert not torch.allclose(uneven.scores, plain.scores)
    with torch.no_grad():
        mosaic.weight[pairs[:, 1]] = mosaic.weight[pairs[:, 0]]
    plain = Predictor(mosaic)(image)
    flipped = Predictor(mosaic, flip_test=True)(image)
    torch.testing.assert_close(flipped.keypoints, plain.keypoints, rtol=0, atol=1e-3)
    torch.testing.assert_close(flipped.scores, plain.scores)


def test_dropout_is_off_and_no_graph_is_kept(mosaic, pictures) -> None:
    mosaic.train()
    poses = Predictor(mosaic)(pictures(1)[0])
    assert not mosaic.training
    assert not poses.keypoints.requires_grad


def test_any_kind_of_picture(mosaic, pictures) -> None:
    image = pictures(1)[0]
    expected = Predictor(mosaic)(image).keypoints
    backwards = np.ascontiguousarray(image[..., ::-1])[..., ::-1]
    assert min(backwards.strides) < 0
    pillow = pytest.importorskip("PIL.Image").fromarray(image)
    for same in (backwards, pillow):
        assert torch.equal(Predictor(mosaic)(same).keypoints, expected)


def test_no_boxes_are_nobody(mosaic, pictures) -> None:
    poses = Predictor(mosaic)(pictures(1)[0], [])
    assert poses.keypoints.shape == (0, 17, 2)
    assert poses.scores.shape == (0, 17)


def test_errors_name_the_argument(mosaic) -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    for build, message in (
        (lambda: Predictor(nn.Identity()), "image_size is None; expected"),
        (lambda: Predictor(mosaic, decode="x"), "decode is 'x'; expected one of mmpose1"),
        (lambda: Predictor(mosaic, batch_size=0), "batch_size is 0; expected at least 1"),
        (lambda: Predictor(mosaic)(image[..., 0]), r"image has shape \(20, 20\); expected"),
        (
            lambda: Predictor(mosaic)(image, [[0, 0, 0, 5]]),
            "boxes are .*; expected .* positive width",
        ),
        (
            lambda: Predictor(mosaic)(image, [[0, 0, float("nan"), 5]]),
            "boxes are .*nan.*; expected finite",
        ),
        (
            lambda: Predictor(mosaic)(image, [[5, 5, 1e-7, 1e-7]]),
            "boxes are .*; expected .* too small",
        ),
        (
            lambda: Predictor(mosaic)(image, [[0, 0, 1e39, 1e39]]),
            "boxes are .*; expected .* too small",
        ),
        (lambda: Predictor(mosaic)(image, [0, 0, 5, 5]), r"boxes has shape .*; expected \(N, 4\)"),
        (
            lambda: Predictor(mosaic, skeleton=Skeleton(("nose",), ()))(image),
            "skeleton has 1 keypoints; expected 17, as the model",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build()
