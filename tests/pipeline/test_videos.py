"""`kernelpose predict` on videos."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("PIL")
pytest.importorskip("tqdm")

import cv2

from kernelpose.cli import main
from kernelpose.data.images import write_png
from kernelpose.data.videos import Video, writing_video
from kernelpose.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny_vitpose")


def frames(count: int) -> list[np.ndarray]:
    """A bright square that moves over a dark ground."""
    made = []
    for number in range(count):
        frame = np.full((48, 64, 3), (20, 40, 30), np.uint8)
        frame[10:30, 4 * number : 4 * number + 20] = (230, 120, 60)
        made.append(frame)
    return made


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    with writing_video(path, 10.0) as write:
        for frame in frames(9):
            write(frame)
    return path


def test_what_is_written_is_read(clip: Path) -> None:
    video = Video(clip)
    assert (video.rate, video.announced) == (10.0, 9)
    read = list(video)
    assert len(read) == 9
    for frame, expected in zip(read, frames(9), strict=True):
        assert frame.shape == (48, 64, 3)
        assert np.abs(frame.astype(int) - expected).mean() < 8  # red stays red
    assert list(clip.parent.iterdir()) == [clip]


def test_an_odd_size_and_an_interrupt(tmp_path: Path) -> None:
    with writing_video(tmp_path / "odd.mp4", 25.0) as write:
        write(np.zeros((33, 47, 3), np.uint8))
    assert [frame.shape for frame in Video(tmp_path / "odd.mp4")] == [(32, 46, 3)]
    with pytest.raises(KeyboardInterrupt), writing_video(tmp_path / "cut.mp4", 25.0) as write:
        write(np.zeros((32, 46, 3), np.uint8))
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["odd.mp4"]
    elsewhere = writing_video(tmp_path / "no" / "a.mp4", 25.0)
    with pytest.raises(UserError, match=r"no/a\.mp4 cannot be written"), elsewhere:
        pass


def test_whole_frames(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_png(clip.parent / "5.png", frames(1)[0])
    inputs = [str(clip), str(clip.parent / "5.png")]
    assert main(["predict", *inputs, "--out", str(clip.parent / "out")]) == 0
    entries = json.loads((clip.parent / "out/keypoints.json").read_text())
    assert [entry.get("frame") for entry in entries] == [*range(9), None]
    assert [entry["file_name"] for entry in entries] == ["clip.mp4"] * 9 + ["5.png"]
    assert [entry["image_id"] for entry in entries] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 5]
    overlay = Video(clip.parent / "out/clip_pose.mp4")
    assert overlay.rate == 10.0
    drawn = list(overlay)
    assert len(drawn) == 9
    difference = [np.abs(a.astype(int) - b).mean() for a, b in zip(drawn, frames(9), strict=True)]
    assert min(difference) > 8  # the skeletons
    assert "10 persons in 10 images, " in capsys.readouterr().out
    assert len(list((clip.parent / "out").iterdir())) == 3


def test_boxes_of_frames(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def entry(frame: int | None, *box: float) -> dict:
        named = {"file_name": "videos/clip.mp4", "bbox": list(box)}
        return named if frame is None else {**named, "frame": frame}

    boxes = clip.parent / "boxes.json"
    arguments = ["predict", str(clip), "--boxes", str(boxes), "--out", str(clip.parent / "out")]
    found = [entry(7, 30, 5, 20, 20), entry(2, 5, 5, 20, 30), entry(2, 9, 5, 20, 30),
             entry(3, 64, 0, 9, 9)]  # fmt: skip
    boxes.write_text(json.dumps(found))
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert f"a box of frame 3 of {clip} is 64, 0, 9, 9; expected one that meets" in captured.err
    assert "no box for" not in captured.out
    entries = json.loads((clip.parent / "out/keypoints.json").read_text())
    # A frame of a video that the boxes name, but not the frame, shows nobody.
    assert [(entry["frame"], entry["image_id"]) for entry in entries] == [(2, 3), (2, 3), (7, 8)]
    joints = np.array(entries[2]["keypoints"]).reshape(17, 3)
    assert (joints[:, 0] > 30 - 10).all()
    assert len(list(Video(clip.parent / "out/clip_pose.mp4"))) == 9
    boxes.write_text(json.dumps([{**found[0], "file_name": "other.mp4"}]))
    assert main(arguments) == 0
    assert "no box for 1 of the images: the whole image was taken" in capsys.readouterr().out
    assert len(json.loads((clip.parent / "out/keypoints.json").read_text())) == 9
    boxes.write_text(json.dumps([found[0], entry(9, 5, 5, 20, 30)]))
    assert main(arguments) == 1
    assert f"boxes of {clip} name frame 9; expected 0 to 8" in capsys.readouterr().err
    boxes.write_text(json.dumps([found[0], entry(None, 1, 1, 5, 5)]))
    assert main(arguments) == 1
    assert f"a box of {clip} has no frame; expected the number" in capsys.readouterr().err


def test_damaged_videos_are_survived(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = clip.read_bytes()
    folder = clip.parent / "in"
    folder.mkdir()
    clip.rename(folder / "c.mp4")
    (folder / "a.mp4").write_bytes(content[: len(content) // 2])
    (folder / "b.avi").write_text("no video")
    cut = cv2.VideoWriter(str(folder / "d.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    noise = np.random.default_rng(0)
    for _ in range(9):
        cut.write(noise.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    cut.release()
    whole = (folder / "d.avi").read_bytes()
    (folder / "d.avi").write_bytes(whole[: len(whole) // 2])
    assert main(["predict", str(folder), "--out", str(clip.parent / "out")]) == 1
    captured = capsys.readouterr()
    for problem in (
        "a.mp4 is no video that OpenCV can read",
        "b.avi is no video that OpenCV can read",
        "frames; expected 9, as its head announces",
    ):
        assert problem in captured.err
    assert "3 problems" in captured.err
    entries = json.loads((clip.parent / "out/keypoints.json").read_text())
    counts = {name: sum(entry["file_name"] == name for entry in entries)
              for name in ("c.mp4", "d.avi")}  # fmt: skip
    assert counts["c.mp4"] == 9
    assert 0 < counts["d.avi"] < 8
    left = sorted(path.name for path in (clip.parent / "out").iterdir())
    assert left == ["c_pose.mp4", "d_pose.mp4", "keypoints.json"]


def test_a_video_of_an_interrupted_run_is_not_done_again(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = clip.with_name("second.mp4")
    second.write_bytes(clip.read_bytes())
    arguments = ["predict", str(clip), str(second), "--out", str(clip.parent / "out")]
    opened: list[str] = []

    class Interrupted(Video):
        def __init__(self, path: Path) -> None:
            opened.append(path.name)
            super().__init__(path)

        def __iter__(self):
            for number, frame in enumerate(super().__iter__()):
                if opened == ["clip.mp4", "second.mp4"] and number == 5:
                    raise KeyboardInterrupt
                yield frame

    monkeypatch.setattr("kernelpose.pipeline.annotate.Video", Interrupted)
    assert main(arguments) == 130
    left = sorted(path.name for path in (clip.parent / "out").iterdir())
    assert left == ["clip_pose.mp4", "keypoints.partial.jsonl"]
    opened.clear()
    assert main(arguments) == 0
    assert opened == ["second.mp4"]
    entries = json.loads((clip.parent / "out/keypoints.json").read_text())
    assert [entry["frame"] for entry in entries] == [*range(9)] * 2
    assert [entry["keypoints"] for entry in entries[:9]] == [e["keypoints"] for e in entries[9:]]


def test_without_opencv(
    clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert main(["predict", str(clip), "--out", str(clip.parent / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kernelpose: OpenCV is missing (")
    assert error.endswith("expected for videos: pip install kernelpose[predict].\n")
    assert not (clip.parent / "out").exists()
