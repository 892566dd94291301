"""`kernelpose predict` from the command line to its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("tqdm")

import kernelpose
from kernelpose.checkpoints import convert_state_dict
from kernelpose.cli import main
from kernelpose.data.images import read_image, write_png
from kernelpose.data.skeletons import MPII, Skeleton
from kernelpose.models import HRPVT, HEViTPose, MiTPOSE, MobileViTPose, PVTv2, ViTPose
from kernelpose.models.pose_model import PoseModel
from kernelpose.models.vitpose import SIZES
from kernelpose.pipeline import Predictor, annotate, overlay
from kernelpose.pipeline.model import load_model
from tests.models.test_mobilevitpose import TINY as MOBILEVIT

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
    assert "encoder.pth lacks 14 tensors; expected a whole model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"decoder": "classic", "image_size": (128, 96)},
        {"decoder": "simple", "image_size": (64, 48)},
        {"decoder": "classic", "image_size": (64, 48), "patch_stride": 8},
        {"decoder": "classic", "image_size": (64, 48), "num_keypoints": {"aic": 14, "coco": 17}},
        {"decoder": "simple", "image_size": (64, 48), "patch_stride": 8},
        {"image_size": (64, 48), "attention": "window+shift", "window": (2, 2)},
        {
            "image_size": (64, 48),
            "attention": "window+pool",
            "num_full_layers": 1,
            "window": (2, 3),
        },
    ],
)
def test_the_model_is_the_checkpoints(folder: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(5)
    model = ViTPose(**SIZES["vitpose-b"], **options).eval()
    torch.save(model.state_dict(), folder / "k.pth")
    loaded = load_model(None, folder / "k.pth").cpu()
    assert loaded.image_size == options["image_size"]
    images = torch.randn(1, 3, *options["image_size"])
    dataset = "coco" if "num_keypoints" in options else None
    assert torch.equal(loaded(images), model(images, dataset=dataset))
    assert predict(folder, "--checkpoint", str(folder / "k.pth"), "--model", "vitpose-b") == 0


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "family",
    ["hrpvt", "hrpvt-heatmaps", "hevitpose", "mitpose", "mitpose-released", "mobilevitpose"],
)
def test_a_checkpoint_of_any_family(folder: Path, family: str, flip: bool) -> None:
    torch.manual_seed(5)
    model: PoseModel
    if family.startswith("hrpvt"):
        decoder = "simple" if family.endswith("heatmaps") else "simcc"
        sizes = {"embed_dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1)}
        model = HRPVT(**sizes, image_size=(64, 48), decoder=decoder).eval()
    elif family == "hevitpose":
        widths = {"embed_dims": (16, 16, 32), "depths": (1, 1, 1)}
        model = HEViTPose(**widths, image_size=(64, 32)).eval()
    elif family == "mobilevitpose":
        model = MobileViTPose(**MOBILEVIT, image_size=(64, 32), decoder="simple").eval()
    else:
        layout = "released" if family.endswith("released") else "figure"
        model = MiTPOSE(
            embed_dim=32, depth=1, num_heads=2, image_size=(64, 48), layout=layout
        ).eval()
    for parameter in model.keypoint_head.parameters():
        torch.nn.init.normal_(parameter)
    torch.save(model.state_dict(), folder / "k.pth")
    heads = [] if family.startswith(("hrpvt", "mobile")) else ["--model-option", "num_heads=2"]
    flags = ["--flip-test"] if flip else []
    assert predict(folder, "--checkpoint", str(folder / "k.pth"), *heads, *flags) == 0
    found = json.loads((folder / "out/keypoints.json").read_text())[0]["keypoints"][2::3]
    poses = Predictor(model, flip_test=flip)(folder / "000000000007.png")
    # The scores: of two nearly equal maxima, rounding chooses one.
    assert poses.scores[0].tolist() == pytest.approx(found, abs=2e-3)


def test_a_model_of_mpii(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    options = {**SIZES["vitpose-b"], "image_size": (64, 48), "decoder": "simple"}
    model = ViTPose(**options, num_keypoints=16).eval()
    for parameter in model.keypoint_head.parameters():
        torch.nn.init.normal_(parameter)
    torch.save(model.state_dict(), folder / "mpii.pth")
    drawn = []

    def draw_poses(pixels: np.ndarray, persons: list[Any], *, skeleton: Skeleton) -> np.ndarray:
        drawn.append(skeleton)
        return overlay.draw_poses(pixels, persons, skeleton=skeleton)

    monkeypatch.setattr(annotate, "draw_poses", draw_poses)
    for flags in ([], ["--flip-test"]):
        assert predict(folder, "--checkpoint", str(folder / "mpii.pth"), *flags) == 0
        entry = json.loads((folder / "out/keypoints.json").read_text())[0]
        assert len(entry["keypoints"]) == 48
        poses = Predictor(model, flip_test=bool(flags))(folder / "000000000007.png")
        assert poses.scores[0].tolist() == pytest.approx(entry["keypoints"][2::3], abs=2e-3)
    assert drawn == [MPII] * 6


def test_the_decoder_that_is_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {**SIZES["vitpose-b"], "image_size": (64, 48), "decoder": "simple"}
    for joints, number, message in (
        ({"mpii": 16, "coco": 17}, None, 17),
        ({"mpii": 16, "coco": 17}, 16, 16),
        ({"aic": 14, "mpii": 16}, None, 16),
        (
            {"aic": 14, "ap10k": 17},
            None,
            "k.pth has decoders of aic (14), ap10k (17); expected coc",
        ),
        ({"aic": 14, "mpii": 16}, 17, "expected coco's or mpii's of 17 joints."),
        (17, 16, "has shape (17, 24, 3, 3); expected the model's (16, 24, 3, 3)"),
    ):
        model = ViTPose(**options, num_keypoints=joints)
        torch.save(model.state_dict(), folder / "k.pth")
        flags = [] if number is None else ["--model-option", f"num_keypoints={number}"]
        code = predict(folder, "--checkpoint", str(folder / "k.pth"), *flags)
        error = capsys.readouterr().err
        if isinstance(message, str):
            assert code == 2
            assert message in error
        else:
            assert code == 0
            entry = json.loads((folder / "out/keypoints.json").read_text())[0]
            assert len(entry["keypoints"]) == 3 * message


def test_joints_of_a_named_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(folder, "--model-option", "num_keypoints=16") == 0
    entry = json.loads((folder / "out/keypoints.json").read_text())[0]
    assert len(entry["keypoints"]) == 48
    capsys.readouterr()
    assert predict(folder, "--model-option", "num_keypoints=21") == 2
    assert "num_keypoints is 21; expected 17 or 16 (COCO or MPII)" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("name", [model.name for model in kernelpose.list_models()])
@pytest.mark.parametrize("joints", [16, 17])
def test_every_model_of_the_zoo(
    folder: Path, shared: Path, monkeypatch: pytest.MonkeyPatch, name: str, joints: int
) -> None:
    monkeypatch.setattr(kernelpose, "create_model", kernelpose.models.create_model)
    image = shared / "samples/mpii/images/005808361.jpg"
    option = ["--model-option", f"num_keypoints={joints}"]
    assert main(["predict", str(image), "--model", name, "--out", str(folder), *option]) == 0
    (entry,) = json.loads((folder / "keypoints.json").read_text())
    assert len(entry["keypoints"]) == 3 * joints
    assert np.isfinite(entry["keypoints"]).all()
    assert read_image(folder / "005808361_pose.png").shape == read_image(image).shape


def test_an_option_of_a_named_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "mobilevitpose-xxs"
    monkeypatch.setattr(kernelpose, "create_model", kernelpose.models.create_model)
    assert predict(folder, "--model", name, "--model-option", "variant=apple") == 0
    assert len(json.loads((folder / "out/keypoints.json").read_text())) == 3


def test_models_that_cannot_be_had(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"embed_dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1)}
    torch.save(PVTv2(**sizes).state_dict(), folder / "k.pth")
    torch.save(HRPVT(**sizes, image_size=(64, 48)).state_dict(), folder / "h.pth")
    for arguments, message in (
        (["--model", "pvtv2-b0"], "pvtv2-b0 is a backbone alone; expected a model that finds"),
        (["--checkpoint", str(folder / "k.pth")], "k.pth is a backbone alone; expected a model"),
        (
            ["--model", "hrpvt-s", "--model-option", "attention=window"],
            "--model-option is attention; expected one of image_size, num_heads, insertion, decod",
        ),
        (
            ["--checkpoint", str(folder / "h.pth"), "--model-option", "num_heads=2"],
            "num_heads is 2; expected four positive numbers",
        ),
        (
            ["--checkpoint", str(folder / "h.pth"), "--model", "hrpvt-s"],
            "--model is hrpvt-s; expected a HRPVT of embed_dims (16, 32, 40, 64), depths (1, 1, 1",
        ),
    ):
        assert predict(folder, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_checkpoints_of_another_size_or_skeleton_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for joints, name, message in (
        (17, "vitpose-s", "--model is vitpose-s; expected a ViTPose of embed_dim 24, depth 2"),
        (17, "vitpose-x", "--model is vitpose-x; expected one of vitpose-s"),
        (21, "vitpose-b", "finds 21 keypoints; expected 17 or 16 (COCO or MPII), to be drawn"),
    ):
        model = ViTPose(**SIZES["vitpose-b"], image_size=(64, 48), num_keypoints=joints)
        torch.save(model.state_dict(), folder / "k.pth")
        assert predict(folder, "--checkpoint", str(folder / "k.pth"), "--model", name) == 2
        assert message in capsys.readouterr().err


def test_model_options_say_what_a_checkpoint_does_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    options = {"patch_stride": 8, "attention": "window+shift", "window": (2, 3)}
    model = ViTPose(**SIZES["vitpose-b"], decoder="simple", image_size=(64, 48), **options).eval()
    images = torch.randn(1, 3, 64, 48)
    official, _ = convert_state_dict(model.state_dict(), "official")
    torch.save(official, folder / "o.pth")
    loaded = load_model(None, folder / "o.pth", options).cpu()
    assert torch.equal(loaded(images), model(images))
    # They go before what a checkpoint records.
    torch.save(model.state_dict(), folder / "k.pth")
    full = load_model(None, folder / "k.pth", {"attention": "full"}).cpu()
    assert not torch.equal(full(images), model(images))
    assert "the model has attention='full'" in capsys.readouterr().out


def test_model_options_on_the_command_line(folder: Path) -> None:
    def keypoints(*options: str) -> list[Any]:
        arguments = [part for option in options for part in ("--model-option", option)]
        assert predict(folder, *arguments) == 0
        results = json.loads((folder / "out/keypoints.json").read_text())
        return [entry["keypoints"] for entry in results]

    shifted = keypoints("attention=window+shift", "window=2,2")
    assert keypoints("attention=window+shift", "window=2,2") == shifted
    assert keypoints("attention=window", "window=2,2") != shifted != keypoints()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("attention", "attention is ''; expected one of full, window"),
        ("attention=both", "attention is 'both'; expected one of full, window"),
        ("window=8", "--model-option window is '8'; expected two integers, as in 8,8"),
        ("patch_stride=x", "--model-option patch_stride is 'x'; expected an integer"),
        ("colour=red", "--model-option is colour=red; expected NAME=VALUE with a name of att"),
    ],
)
def test_a_wrong_model_option_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    assert predict(folder, "--model-option", option) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_input_is_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_png(folder / "b_pose.png", np.zeros((30, 30, 3), np.uint8))
    (folder / "boxes.json").rename(folder / "keypoints.json")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (folder / "alias").symlink_to(folder)
    for arguments, output in (
        (["b.png", "b_pose.png"], "b_pose.png"),
        (["b.png", "--boxes", "keypoints.json"], "keypoints.json"),
        (["b.png", "--checkpoint", "keypoints.json"], "keypoints.json"),
    ):
        inputs = [a if a.startswith("--") else str(folder / a) for a in arguments]
        assert main(["predict", *inputs, "--out", str(folder / "alias")]) == 2
        assert f"{output} does not replace the input {folder / output}." in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jpg"], "missing.jpg is no file; expected an image"),
        (["a.png", "--boxes", "missing.json"], "missing.json cannot be read: No such file"),
        (["a.png", "--boxes", "text.jpg"], "text.jpg is not JSON"),
        (["a.png", "--boxes", "object.json"], "object.json is an object; expected a list"),
        (["a.png", "--checkpoint", "missing.pth"], "missing.pth"),
        (["a.png", "--checkpoint", "text.jpg"], "text.jpg"),
        ([".", "--out", "empty/.."], "--out is empty/..; expected another folder than the images'"),
        (["empty"], "empty holds no image and no video; expected one such as a JPEG"),
        (["a.png", "--out", "a.png"], "a.png cannot be made a directory"),
        (["a.png", "--out", "a.png/b"], "a.png/b cannot be made a directory"),
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
    Path("empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(["predict", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("kernelpose: ")
    assert "\n" not in error
    assert sorted(tmp_path.rglob("*")) == before
