"""`kernelpose predict` from the command line to its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("tqdm")

import kernelpose
from kernelpose.cli import main
from kernelpose.data.images import read_image, write_png

pytestmark = pytest.mark.usefixtures("tiny_vitpose")


@pytest.fixture
def folder(tmp_path: Path, pictures) -> Path:
    for name, image in zip(("000000000007.png", "b.png", "c.png"), pictures(3), strict=True):
        write_png(tmp_path / name, image)
    boxes = [
        {"image_id": 7, "category_id": 1, "bbox": [5, 5, 30, 40], "score": 0.9},
        {"image_id": 7, "category_id": 1, "bbox": [-10, 5, 30, 40], "score": 0.1},
        {"file_name": "b.png", "bbox": [3, 3, 10, 10]},
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    return tmp_path


def predict(folder: Path, *arguments: str) -> int:
    images = [str(path) for path in sorted(folder.glob("*.png"))]
    return main(["predict", *images, "--out", str(folder / "out"), *arguments])


def test_whole_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(folder) == 0
    output = capsys.readouterr().out
    assert "no --checkpoint: the weights of vitpose-b are random" in output
    assert "3 persons in 3 images" in output
    results = json.loads((folder / "out/keypoints.json").read_text())
    assert [entry["image_id"] for entry in results] == [7, 1, 2]
    for entry in results:
        assert set(entry) == {"image_id", "file_name", "category_id", "keypoints", "score"}
        assert entry["category_id"] == 1
        assert len(entry["keypoints"]) == 51
        drawn = read_image(folder / "out" / (Path(entry["file_name"]).stem + "_pose.png"))
        assert drawn.shape == read_image(folder / entry["file_name"]).shape
    assert len(list((folder / "out").iterdir())) == 4


def test_boxes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(folder, "--boxes", str(folder / "boxes.json")) == 0
    assert "no box for 1 of the images: the whole image was taken" in capsys.readouterr().out
    results = json.loads((folder / "out/keypoints.json").read_text())
    assert [entry["file_name"] for entry in results] == ["000000000007.png"] * 2 + [
        "b.png",
        "c.png",
    ]
    joints = np.array(results[2]["keypoints"]).reshape(17, 3)
    # b.png's only person is the 10x10 box, whose crop ends a quarter beyond it.
    assert (joints[:, :2] > 3 - 5).all()
    assert (joints[:, :2] < 13 + 5).all()


def test_results_are_what_pycocotools_reads(shared: Path, tmp_path: Path) -> None:
    pycocotools = pytest.importorskip("pycocotools.coco")
    folder = shared / "samples/coco"
    images = [str(path) for path in sorted((folder / "val2017").glob("*.jpg"))]
    boxes = folder / "person_detection_results/COCO_val2017_detections_AP_H_56_person.json"
    assert main(["predict", *images, "--boxes", str(boxes), "--out", str(tmp_path)]) == 0
    coco = pycocotools.COCO(folder / "annotations/person_keypoints_val2017.json")
    loaded = coco.loadRes(str(tmp_path / "keypoints.json"))
    assert len(loaded.getAnnIds()) == 118
    assert all(len(entry["keypoints"]) == 51 for entry in loaded.anns.values())


@pytest.mark.parametrize("mode", ["mmpose0", "transformers", "shift"])
def test_decode_modes_and_flip_test(folder: Path, mode: str) -> None:
    def keypoints(*arguments: str) -> np.ndarray:
        assert predict(folder, *arguments) == 0
        results = json.loads((folder / "out/keypoints.json").read_text())
        return np.array([entry["keypoints"] for entry in results])

    plain = keypoints()
    assert np.array_equal(plain, keypoints())
    assert not np.array_equal(plain, keypoints("--decode", mode))
    assert not np.array_equal(plain, keypoints("--flip-test"))


def test_equal_names_in_two_folders(folder: Path) -> None:
    (folder / "d").mkdir()
    write_png(folder / "d/b.png", np.zeros((30, 30, 3), np.uint8))
    out = folder / "out"
    images = [str(folder / "b.png"), str(folder / "d/b.png")]
    assert main(["predict", *images, "--out", str(out)]) == 0
    assert read_image(out / "b_pose.png").shape != read_image(out / "b_pose_2.png").shape


def test_a_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    model = kernelpose.create_model("vitpose-b")
    torch.save(model.state_dict(), folder / "whole.pth")
    assert predict(folder) == 0
    random = (folder / "out/keypoints.json").read_text()
    capsys.readouterr()
    assert predict(folder, "--checkpoint", str(folder / "whole.pth")) == 0
    assert "random" not in capsys.readouterr().out
    assert (folder / "out/keypoints.json").read_text() != random
    encoder = {k: v for k, v in model.state_dict().items() if k.startswith("backbone")}
    torch.save(encoder, folder / "encoder.pth")
    assert predict(folder, "--checkpoint", str(folder / "encoder.pth")) == 2
    assert "encoder.pth does not fit --model vitpose-b: it lacks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jpg"], "no such image file: missing.jpg"),
        (["text.jpg"], "text.jpg is not an image"),
        (["a.png", "--boxes", "missing.json"], "cannot read the boxes file missing.json"),
        (["a.png", "--boxes", "text.jpg"], "the boxes file text.jpg is not JSON"),
        (["a.png", "--boxes", "object.json"], "must hold a list of COCO detections"),
        (["a.png", "--boxes", "outside.json"], "a box of a.png lies outside the 20x10 picture"),
        (["a.png", "--checkpoint", "missing.pth"], "missing.pth"),
        (["a.png", "--checkpoint", "text.jpg"], "text.jpg"),
        (["a.png", "--out", "a.png"], "cannot make the directory a.png"),
        (["a.png", "--out", "a.png/b"], "cannot make the directory a.png/b"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_png("a.png", np.zeros((10, 20, 3), np.uint8))
    Path("text.jpg").write_text("neither a picture nor JSON")
    Path("object.json").write_text("{}")
    Path("outside.json").write_text('[{"file_name": "a.png", "bbox": [20, 0, 5, 5]}]')
    before = sorted(tmp_path.rglob("*"))
    assert main(["predict", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("kernelpose: ")
    assert "\n" not in error
    assert sorted(tmp_path.rglob("*")) == before
