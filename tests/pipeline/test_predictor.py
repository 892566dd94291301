"""From images and boxes to keypoints in image pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernelpose.codecs import encode_udp
from kernelpose.data.boxes import box_to_center_scale, warp_matrix
from kernelpose.data.coco import DetectionIndex, read_detections
from kernelpose.data.images import write_png
from kernelpose.data.skeletons import COCO, MPII, Skeleton
from kernelpose.models import ViTPose
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
    poses = Predictor(Oracle(in_crop), flip_test=False)(np.zeros((400, 600, 3), np.uint8), boxes)
    assert (poses.keypoints - truth).abs().max() < 0.05
    assert (poses.scores > 0.93).all()


def test_simcc_logits_are_decoded_at_their_own_resolution(pictures) -> None:
    class Point(nn.Module):
        image_size = (64, 48)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x, y = (torch.zeros(len(images), 17, 3 * side) for side in (48, 64))
            x[..., 60], y[..., 33] = 0.5, 0.25
            return x, y

    box = torch.tensor([[10.0, 5.0, 30.0, 40.0]])
    center, scale = box_to_center_scale(box, (64, 48))
    poses = Predictor(Point(), flip_test=False)(pictures(1)[0], box)
    of_scale = torch.tensor([20.0, 11.0]) / torch.tensor([47.0, 63.0])
    expected = center - scale / 2 + of_scale * scale
    torch.testing.assert_close(poses.keypoints[0], expected.float().expand(17, 2))
    assert torch.equal(poses.scores, torch.full((1, 17), 0.25))


def test_the_skeleton_is_that_of_the_models_joints(mosaic: nn.Module) -> None:
    assert Predictor(mosaic).skeleton is COCO
    for joints, skeleton in ((16, MPII), (17, COCO), ({"mpii": 16}, COCO)):
        mosaic.num_keypoints = joints
        assert Predictor(mosaic).skeleton is skeleton


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_batches_span_images_and_change_nothing(mosaic, pictures, batch_size: int) -> None:
    images = pictures(5)
    boxes = [
        np.array([[i, 2, 20 + i, 30 + 2 * n] for n in range(count)]).reshape(-1, 4)
        for i, count in enumerate((2, 0, 5, 1, 3))
    ]
    items = list(zip(images, boxes, strict=True))
    alone = [Predictor(mosaic, flip_test=False)(*item) for item in items]
    mosaic.batches.clear()
    predictor = Predictor(mosaic, flip_test=False, batch_size=batch_size)
    poses = list(predictor.stream(items))
    assert [len(pose.keypoints) for pose in poses] == [2, 0, 5, 1, 3]
    assert mosaic.batches == [batch_size] * (11 // batch_size) + (
        [11 % batch_size] if 11 % batch_size else []
    )
    backwards = list(predictor.stream(reversed(items)))[::-1]
    for expected, *same in zip(alone, poses, backwards, strict=True):
        for found in same:
            torch.testing.assert_close(found.keypoints, expected.keypoints)
            torch.testing.assert_close(found.scores, expected.scores)
            # Nothing of the batch is kept.
            assert found.keypoints.untyped_storage().nbytes() == found.keypoints.nbytes
            assert found.scores.untyped_storage().nbytes() == found.scores.nbytes


@pytest.mark.parametrize(("device", "batches"), [("cpu", [4, 4, 1, 1]), ("cuda", [8, 2])])
def test_a_flip_test_is_one_pass_on_a_gpu(device, batches, mosaic, pictures) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    boxes = [[0, 0, 20, 30 + n] for n in range(5)]
    predictor = Predictor(mosaic, batch_size=4, device=device, cuda_graph=False)
    predictor(pictures(1)[0], boxes)
    assert predictor.model.batches == batches


def test_an_image_is_done_as_soon_as_its_batch_is(mosaic, pictures) -> None:
    taken = []

    def items():
        for number, image in enumerate(pictures(4)):
            taken.append(number)
            yield image, None

    stream = Predictor(mosaic, batch_size=2).stream(items())
    next(stream)
    assert taken == [0, 1]


def test_images_without_anybody_keep_nobody_waiting(mosaic, pictures) -> None:
    (image,) = pictures(1)
    taken = []

    def items():
        for number in range(1000):
            taken.append(number)
            yield image, None if number % 100 == 0 else []

    stream = Predictor(mosaic, batch_size=4).stream(items())
    counts = []
    for poses in stream:
        counts.append(len(poses))
        assert len(taken) - len(counts) <= 8
    assert counts == [1, *[0] * 99] * 10


def test_the_whole_image_is_the_box_by_default(mosaic, pictures) -> None:
    (image,) = pictures(1)
    height, width = image.shape[:2]
    whole = Predictor(mosaic)(image, [[0, 0, width, height]])
    assert torch.equal(Predictor(mosaic)(torch.from_numpy(image)).keypoints, whole.keypoints)


@pytest.mark.parametrize("kind", ["mosaic", "simcc_mosaic"])
def test_flip_test_averages_with_the_mirror(kind: str, request, pictures) -> None:
    """With mirrored joints of equal weight the flip test agrees with the plain one exactly."""
    mosaic = request.getfixturevalue(kind)
    pairs = torch.tensor(COCO.flip_pairs)
    (image,) = pictures(1)
    plain = Predictor(mosaic, flip_test=False)(image)
    uneven = Predictor(mosaic)(image)
    assert not torch.allclose(uneven.scores, plain.scores)
    with torch.no_grad():
        mosaic.weight[pairs[:, 1]] = mosaic.weight[pairs[:, 0]]
    plain = Predictor(mosaic, flip_test=False)(image)
    flipped = Predictor(mosaic)(image)
    torch.testing.assert_close(flipped.keypoints, plain.keypoints, rtol=0, atol=1e-3)
    torch.testing.assert_close(flipped.scores, plain.scores)


def test_dropout_is_off_and_no_graph_is_kept(mosaic, pictures) -> None:
    mosaic.train()
    poses = Predictor(mosaic)(pictures(1)[0])
    assert not mosaic.training
    assert not poses.keypoints.requires_grad


def test_any_kind_of_picture(mosaic, pictures, tmp_path) -> None:
    image = pictures(1)[0]
    expected = Predictor(mosaic)(image).keypoints
    backwards = np.ascontiguousarray(image[..., ::-1])[..., ::-1]
    assert min(backwards.strides) < 0
    pillow = pytest.importorskip("PIL.Image").fromarray(image)
    write_png(tmp_path / "a.png", image)
    path = tmp_path / "a.png"
    kinds = [backwards, pillow, path, str(path), torch.from_numpy(image), image]
    for same in kinds:
        assert torch.equal(Predictor(mosaic)(same).keypoints, expected)
    for found in Predictor(mosaic, batch_size=3).stream((same, None) for same in kinds):
        torch.testing.assert_close(found.keypoints, expected)


def test_a_path_is_read_and_named(mosaic, pictures, tmp_path) -> None:
    image = pictures(1)[0]
    path = tmp_path / "000042.png"
    write_png(path, image)
    boxes = [[3, 4, 30, 40], [10, 5, 20, 30]]
    found, expected = Predictor(mosaic)(str(path), boxes), Predictor(mosaic)(image, boxes)
    assert torch.equal(found.keypoints, expected.keypoints)
    assert (found.image, expected.image) == (path, None)
    assert found.boxes.tolist() == boxes
    entries = found.to_coco(box_scores=[0.5, 1.0])
    assert [entry["image_id"] for entry in entries] == [42, 42]
    assert entries[0]["file_name"] == "000042.png"
    joints = torch.tensor(entries[1]["keypoints"]).view(17, 3)
    torch.testing.assert_close(joints[:, :2], found.keypoints[1], rtol=0, atol=5.1e-4)
    mean = found.scores.double().mean(-1)  # all joints of the mosaic are above 0.2
    assert (found.scores > 0.2).all()
    torch.testing.assert_close(
        torch.tensor([entry["score"] for entry in entries], dtype=torch.float64),
        mean * torch.tensor([0.5, 1.0], dtype=torch.float64),
        rtol=0,
        atol=6e-6,
    )
    assert expected.to_coco(7)[0]["image_id"] == 7
    assert "file_name" not in expected.to_coco(7)[0]
    with pytest.raises(ValueError, match="image_id is None; expected a number"):
        expected.to_coco()


def test_another_dtype_is_a_copy(mosaic, pictures) -> None:
    image = pictures(1)[0]
    predictor = Predictor(mosaic, dtype=torch.bfloat16)
    assert mosaic.weight.dtype == torch.float32
    assert predictor.model.weight.dtype == torch.bfloat16
    poses, expected = predictor(image), Predictor(mosaic, dtype=torch.float32)(image)
    assert poses.keypoints.dtype == poses.scores.dtype == torch.float32
    torch.testing.assert_close(poses.scores, expected.scores, rtol=0.05, atol=0)
    assert Predictor(mosaic, device="cpu").model is mosaic


def test_a_compiled_model_finds_the_same(mosaic, pictures) -> None:
    image = pictures(1)[0]
    mosaic.batches = None  # nothing that changes while it is traced
    expected = Predictor(mosaic)(image)
    found = Predictor(mosaic, compile=True)(image)
    torch.testing.assert_close(found.keypoints, expected.keypoints, rtol=0, atol=1e-3)


@pytest.mark.parametrize("wanted", [False, True])
def test_a_model_that_cannot_be_captured(mosaic, pictures, monkeypatch, wanted: bool) -> None:
    """What a GPU does when it is asked for a graph, told here: fall back, aloud and once."""
    asked = []

    def refuse(graphed, *inputs):
        asked.append(len(inputs[0]))
        raise RuntimeError("capture refused")

    monkeypatch.setattr("kernelpose.pipeline.graph.Graphed.__call__", refuse)
    (image,) = pictures(1)
    expected = Predictor(mosaic)(image).keypoints
    predictor = Predictor(mosaic)
    predictor._graph_size, predictor._graphs_wanted = 1, wanted
    predictor(image, [[0, 0, 20, 30]] * 2)
    assert asked == []
    if wanted:
        with pytest.raises(RuntimeError, match="capture refused"):
            predictor(image)
        return
    with pytest.warns(UserWarning, match="runs without a CUDA graph: capture refused"):
        assert torch.equal(predictor(image).keypoints, expected)
    assert torch.equal(predictor(image).keypoints, expected)
    assert asked == [1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("cuda_graph", [True, "auto", False])
def test_graphs_and_uploads_change_nothing_on_a_gpu(mosaic, pictures, cuda_graph) -> None:
    images = pictures(6)
    boxes = [[[i, 2, 20 + i, 30 + 2 * n] for n in range(count)]
             for i, count in enumerate((1, 3, 1, 0, 2, 1))]  # fmt: skip
    items = list(zip(images, boxes, strict=True))
    expected = [Predictor(mosaic)(*item) for item in items]
    mosaic.batches = None
    predictor = Predictor(mosaic, device="cuda", cuda_graph=cuda_graph, batch_size=2)
    for _ in range(2):  # captured, then replayed
        for found, plain in zip(predictor.stream(items), expected, strict=True):
            torch.testing.assert_close(found.keypoints, plain.keypoints, rtol=0, atol=2e-2)
            torch.testing.assert_close(found.scores, plain.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_only_keypoints_and_scores_come_back_from_a_gpu(mosaic, pictures) -> None:
    fetched = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            source = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
            if isinstance(result, torch.Tensor) and result.is_cpu and source is not None:
                fetched.extend([result.numel()] if source.is_cuda else [])
            return result

    predictor = Predictor(mosaic, device="cuda", cuda_graph=False)
    with Copies():
        predictor(pictures(1)[0], [[0, 0, 20, 30]] * 5)
    assert sorted(fetched) == [5 * 17, 5 * 17 * 2]


def test_no_boxes_are_nobody(mosaic, pictures) -> None:
    images = pictures(3)
    for nobody in ([], np.zeros((0, 4)), torch.zeros(0, 4)):
        poses = Predictor(mosaic)(images[0], nobody)
        assert poses.keypoints.shape == (0, 17, 2)
        assert poses.scores.shape == (0, 17)
        assert poses.boxes.shape == (0, 4)
        assert poses.to_coco(1) == []
    assert mosaic.batches == []
    assert list(Predictor(mosaic).stream([])) == []
    counts = [len(poses) for poses in Predictor(mosaic).stream((i, []) for i in images)]
    assert counts == [0, 0, 0]


def test_real_photographs_alone_and_together(shared: Path) -> None:
    """A narrow ViTPose on COCO's photographs and detections: batches change rounding alone."""
    folder = shared / "samples/coco"
    detections = DetectionIndex(
        read_detections(
            folder / "person_detection_results/COCO_val2017_detections_AP_H_56_person.json"
        )
    )
    torch.manual_seed(0)
    model = ViTPose(embed_dim=24, depth=2, num_heads=2, decoder="simple", image_size=(64, 48))
    items = [
        (path, [found.box for found in detections.of(path)][:20])
        for path in sorted((folder / "val2017").glob("*.jpg"))
    ]
    together = Predictor(model).stream(items)
    for (path, boxes), poses in zip(items, together, strict=True):
        alone = Predictor(model, batch_size=1)(path, boxes)
        assert len(alone) == len(boxes) > 0
        # An arg-max of two nearly equal peaks may fall on either: those are few.
        far = (poses.keypoints - alone.keypoints).abs().amax(-1) > 1e-2
        assert far.float().mean() < 0.01
        torch.testing.assert_close(poses.scores, alone.scores, rtol=1e-4, atol=1e-5)


def test_a_model_without_parameters(pictures) -> None:
    class Brightness(nn.Module):
        image_size = (64, 48)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(images, 4).mean(1, True).expand(-1, 17, -1, -1)

    assert len(Predictor(Brightness())(pictures(1)[0])) == 1


def test_errors_name_the_argument(mosaic) -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    for build, message in (
        (lambda: Predictor(nn.Identity()), "image_size is None; expected"),
        (lambda: Predictor(mosaic, decode="x"), "decode is 'x'; expected one of mmpose1"),
        (lambda: Predictor(mosaic, batch_size=0), "batch_size is 0; expected at least 1"),
        (
            lambda: Predictor(mosaic)(image[..., 0]),
            r"image is torch.uint8 of shape \(20, 20\); exp",
        ),
        (lambda: Predictor(mosaic)(image / 255), r"image is torch.float64 of shape .*; expected u"),
        (
            lambda: Predictor(mosaic)(image[:0], [[0, 0, 5, 5]]),
            r"shape \(0, 20, 3\); expected uint8",
        ),
        (lambda: Predictor(mosaic, dtype=torch.float64), "dtype is torch.float64; expected torch."),
        (lambda: Predictor(mosaic, device="cuda:99"), "device is cuda:99; expected one that is he"),
        (lambda: Predictor(mosaic, device="gpu"), r"device is gpu; expected one that is here \(Ex"),
        (lambda: Predictor(mosaic, cuda_graph=True), "cuda_graph is True; expected 'auto' or"),
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


@pytest.mark.parametrize("values", [None, "abc", {}, [[1, 2, 3, 4], [5]]])
def test_what_is_no_array(mosaic, values: object) -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    for name, arguments in (("image", ({} if isinstance(values, str) else values,)),
                            ("boxes", (image, values or {}))):  # fmt: skip
        with pytest.raises(TypeError, match=f"{name} is .*; expected a tensor or an array"):
            Predictor(mosaic)(*arguments)


@pytest.mark.parametrize("flip_test", [True, False])
@pytest.mark.parametrize("times", [1, 3])
def test_a_model_that_gives_no_heatmaps(mosaic, flip_test: bool, times: int) -> None:
    mosaic.register_forward_hook(lambda model, inputs, output: (output,) * times)
    with pytest.raises(TypeError, match="model gives tuple; expected a tensor of heatmaps"):
        Predictor(mosaic, flip_test=flip_test)(np.zeros((20, 20, 3), np.uint8))
