"""`kernelpose predict` on folders: what is taken, what is survived, what an interrupt leaves."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
pytest.importorskip("tqdm")

from kernelpose.cli import main
from kernelpose.data.images import write_png
from kernelpose.pipeline import annotate
from kernelpose.pipeline.journal import Journal, Outcome
from kernelpose.pipeline.sources import Source

pytestmark = pytest.mark.usefixtures("tiny_vitpose")


@pytest.fixture
def folder(tmp_path: Path, pictures) -> Path:
    path = tmp_path / "in"
    path.mkdir()
    for name, image in zip(("b.png", "a.PNG", "3.png", "d.png"), pictures(4), strict=True):
        write_png(path / name, image)
    return path


def predict(folder: Path, *arguments: str) -> int:
    return main(["predict", str(folder), *arguments, "--out", str(folder.parent / "out")])


def results(folder: Path) -> list:
    return json.loads((folder.parent / "out/keypoints.json").read_text())


def names(folder: Path) -> list[str]:
    return [entry["file_name"] for entry in results(folder)]


def test_a_folder_is_its_images_in_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "deeper.png").mkdir()
    (folder / "notes.txt").write_text("none of them")
    (folder / ".hidden.png").write_text("none of them")
    again = [str(folder / "b.png"), str(folder / "." / "b.png"), str(folder.parent / "c.png")]
    write_png(folder.parent / "c.png", np.zeros((20, 30, 3), np.uint8))
    assert predict(folder, *again) == 0
    assert names(folder) == ["3.png", "a.PNG", "b.png", "d.png", "c.png"]
    assert [entry["image_id"] for entry in results(folder)] == [3, 1, 2, 4, 5]
    output = capsys.readouterr().out
    assert "5 persons in 5 images, " in output
    assert " images a second: " in output
    assert sorted(path.name for path in (folder.parent / "out").iterdir()) == [
        "3_pose.png", "a_pose.png", "b_pose.png", "c_pose.png", "d_pose.png", "keypoints.json"
    ]  # fmt: skip


def test_what_cannot_be_done_is_listed_and_the_rest_done(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.PNG").write_bytes((folder / "a.PNG").read_bytes()[:200])
    (folder / "c.png").touch()
    (folder / "e.png").symlink_to(folder / "d.png")
    boxes = [
        {"file_name": "b.png", "bbox": [5, 5, 20, 20]},
        {"file_name": "b.png", "bbox": [500, 0, 5, 5]},
        {"file_name": "b.png", "bbox": [5, 5, 1e-7, 1e-7]},
        {"file_name": "b.png", "bbox": [0, 0, 1e39, 1e39]},
        {"file_name": "d.png", "bbox": [-9, 0, 9, 9]},
        {"file_name": "e.png", "bbox": [-9, 0, 9.5, 9]},
    ]
    (folder.parent / "boxes.json").write_text(json.dumps(boxes))
    assert predict(folder, "--boxes", str(folder.parent / "boxes.json")) == 1
    assert names(folder) == ["3.png", "b.png", "e.png"]
    captured = capsys.readouterr()
    assert "no box for 1 of the images" in captured.out
    assert "3 persons in 4 images" in captured.out
    assert "4 overlays" in captured.out
    heading, *problems = captured.err.strip().splitlines()
    assert heading == "kernelpose: 6 problems, all else is done"
    for name, problem in (
        ("a.PNG", "is damaged or too large"),
        ("c.png", "is no image that Pillow knows; expected"),
        ("b.png", "is 500, 0, 5, 5; expected one that meets the "),
        ("b.png", "is 5, 5, 1e-07, 1e-07; expected one neither too small nor too large"),
        ("b.png", "is 0, 0, 1e+39, 1e+39; expected one neither too small nor too large"),
        ("d.png", "is -9, 0, 9, 9; expected one that meets the "),
    ):
        assert sum(name in line and problem in line for line in problems) == 1
    assert not (folder.parent / "out/a_pose.png").exists()
    assert (folder.parent / "out/d_pose.png").is_file()
    assert not list((folder.parent / "out").glob("*partial*"))


def test_nothing_can_be_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jpg").write_text("no picture")
    assert main(["predict", str(tmp_path / "a.jpg"), "--out", str(tmp_path / "out")]) == 1
    assert json.loads((tmp_path / "out/keypoints.json").read_text()) == []
    captured = capsys.readouterr()
    assert "0 persons in 0 images: " in captured.out
    assert "1 problem, all else is done\n" in captured.err


class Interrupt:
    """`read_image` that is interrupted at the n-th picture, and remembers what it read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.read: list[str] = []
        read_image = annotate.read_image

        def reading(path: Path) -> np.ndarray:
            if len(self.read) == at:
                raise KeyboardInterrupt
            self.read.append(path.name)
            return read_image(path)

        monkeypatch.setattr(annotate, "read_image", reading)


@pytest.fixture
def one_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what was read before an interrupt is done."""
    monkeypatch.setattr("kernelpose.pipeline.command.persons_a_pass", lambda model: 1)


@pytest.mark.usefixtures("one_a_batch")
def test_an_interrupted_folder_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(folder) == 0
    whole, out = results(folder), folder.parent / "out"
    for path in out.iterdir():
        path.unlink()
    with monkeypatch.context() as patch:
        Interrupt(patch, at=2)
        assert predict(folder) == 130
    assert "interrupted" in capsys.readouterr().err
    left = sorted(path.name for path in out.iterdir())
    assert left == ["3_pose.png", "a_pose.png", "keypoints.partial.jsonl"]
    before = (out / "a_pose.png").stat().st_mtime_ns
    with (out / "keypoints.partial.jsonl").open("a") as file:
        file.write('{"source": "cut sh')  # as a machine that stops leaves it
    with monkeypatch.context() as patch:
        again = Interrupt(patch, at=1)
        assert predict(folder) == 130
        assert again.read == ["b.png"]
    with monkeypatch.context() as patch:
        last = Interrupt(patch, at=99)
        assert predict(folder) == 0
        assert last.read == ["d.png"]
    assert "3 of 4 inputs were done before" in capsys.readouterr().out
    assert results(folder) == whole
    assert (out / "a_pose.png").stat().st_mtime_ns == before
    assert not (out / "keypoints.partial.jsonl").exists()


def test_what_is_done_is_on_the_disk_at_once(folder: Path) -> None:
    """A machine that stops closes no file."""
    source = Source(folder / "b.png", "b_pose.png")
    path, outcome = folder / "journal.jsonl", Outcome([[{"score": 0.5}]], ["a box"], whole=True)
    with Journal(path, {"--decode": "shift"}) as journal:
        journal.add(source, outcome)
        assert Journal(path, {"--decode": "shift"}).outcome(source) == outcome
        assert Journal(path, {"--decode": "shift"}).outcome(Source(source.path, "other")) is None


def test_a_full_disk_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.BytesIO):
        """As a file's buffer: what could not be written is tried again by close."""

        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        close = flush

    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, mode="r", *a, **k: Full() if mode == "ab" else opened(path, mode, *a, **k),
    )
    assert predict(folder) == 2
    assert capsys.readouterr().err.endswith(
        "out/keypoints.partial.jsonl cannot be written: No space left on device.\n"
    )


def test_a_name_that_the_terminal_cannot_show(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "3.png").rename(folder / "\u00e9.png")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["predict", str(folder / "\u00e9.png"), "--out", str(folder.parent / "out")]) == 0
    stdout.flush()
    assert rb"\xe9_pose.png" in stdout.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("one_a_batch")
def test_what_changed_since_the_interrupt_is_done_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pictures
) -> None:
    with monkeypatch.context() as patch:
        Interrupt(patch, at=3)
        assert predict(folder) == 130
    write_png(folder / "3.png", pictures(5)[4])  # another picture
    (folder.parent / "out/a_pose.png").unlink()  # an overlay lost
    write_png(folder / "2.png", pictures(1)[0])  # one more
    last = Interrupt(monkeypatch, at=99)
    assert predict(folder) == 0
    assert last.read == ["2.png", "3.png", "a.PNG", "d.png"]
    assert names(folder) == ["2.png", "3.png", "a.PNG", "b.png", "d.png"]
    (folder.parent / "out/keypoints.json").rename(folder.parent / "resumed.json")
    assert predict(folder) == 0
    assert results(folder) == json.loads((folder.parent / "resumed.json").read_text())


@pytest.mark.usefixtures("one_a_batch")
def test_problems_of_an_interrupted_run_are_listed_in_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder.parent / "boxes.json").write_text('[{"image_id": 3, "bbox": [500, 0, 5, 5]}]')
    (folder / "2.png").touch()
    boxes = ("--boxes", str(folder.parent / "boxes.json"))
    with monkeypatch.context() as patch:
        Interrupt(patch, at=3)
        assert predict(folder, *boxes) == 130
    capsys.readouterr()
    assert predict(folder, *boxes) == 1
    captured = capsys.readouterr()
    assert "no box for 3 of the images" in captured.out
    assert "2 problems" in captured.err
    assert "3.png is 500, 0, 5, 5" in captured.err
    assert "2.png is no image" in captured.err


@pytest.mark.usefixtures("one_a_batch")
def test_another_setting_does_not_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes = folder.parent / "boxes.json"
    boxes.write_text("[]")
    given = ["--boxes", str(boxes), "--decode", "shift"]
    with monkeypatch.context() as patch:
        Interrupt(patch, at=2)
        assert predict(folder, *given) == 130
    journal = folder.parent / "out/keypoints.partial.jsonl"
    before = journal.read_bytes()
    capsys.readouterr()
    for arguments, message in (
        (given[:2], "--decode is mmpose1; expected shift to go on with what was interrupted"),
        (given[2:], "--boxes is not given; expected /"),
        ([*given, "--flip-test"], "--flip-test is given; expected none to go on"),
        ([*given, "--model", "vitpose-b"], "--model is vitpose-b; expected none to go on"),
        ([*given, "--model-option", "attention=full"], "--model-option is attention=full; exp"),
        ([str(folder / "b.png"), *given], "INPUT is /"),
    ):
        assert predict(folder, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert f"another --out, or {journal} deleted.\n" in error
        assert error.count("\n") == 1
        assert journal.read_bytes() == before
    os.utime(boxes, ns=(1, 1))
    assert predict(folder, *given) == 2
    assert "--boxes is " in capsys.readouterr().err
    journal.unlink()
    assert predict(folder) == 0
    assert len(results(folder)) == 4


@pytest.mark.parametrize("content", ["", "x\n", "3\n", "{}\n[]\n", '{}\n{"source": 1}\n', '[""]\n'])
def test_a_file_that_is_no_journal_is_left_alone(
    folder: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    journal = folder.parent / "out/keypoints.partial.jsonl"
    journal.parent.mkdir()
    journal.write_text(content)
    assert predict(folder) == 2
    error = capsys.readouterr().err
    assert f"{journal} is not what an interrupted run leaves" in error
    assert error.count("\n") == 1
    assert journal.read_text() == content


def test_real_photographs(shared: Path, tmp_path: Path) -> None:
    folder = shared / "samples/coco"
    boxes = folder / "person_detection_results/COCO_val2017_detections_AP_H_56_person.json"
    assert main(["predict", str(folder / "val2017"), "--boxes", str(boxes),
                 "--out", str(tmp_path)]) == 0  # fmt: skip
    entries = json.loads((tmp_path / "keypoints.json").read_text())
    assert len(entries) == 118
    assert {entry["image_id"] for entry in entries} == {
        int(path.stem) for path in (folder / "val2017").iterdir()
    }
    assert len(list(tmp_path.glob("*_pose.png"))) == 4
