"""Detections files, good and bad, and COCO's conventions for results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kernelpose.data.coco import (
    Detection,
    DetectionIndex,
    image_ids,
    person_score,
    read_detections,
    write_json,
)
from kernelpose.errors import UserError

GOOD = {"image_id": 785, "category_id": 1, "bbox": [1, 2, 3.5, 4], "score": 0.5}


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "boxes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_published_detections(shared: Path) -> None:
    folder = shared / "samples/coco"
    detections = read_detections(
        folder / "person_detection_results/COCO_val2017_detections_AP_H_56_person.json"
    )
    assert len(detections) == 118
    images = sorted((folder / "val2017").glob("*.jpg"))
    index = DetectionIndex(detections)
    found = [len(index.of(path)) for path in images]
    assert len(images) == 4
    assert min(found) > 0
    assert sum(found) == 118


def test_defaults_and_categories(tmp_path: Path) -> None:
    entries = [
        GOOD,
        {**GOOD, "category_id": 18},
        {"file_name": "d/a.mp4", "bbox": [0, 0, 1, 1], "frame": 2},
    ]
    assert read_detections(written(tmp_path, entries)) == [
        Detection((1.0, 2.0, 3.5, 4.0), 0.5, 785, None),
        Detection((0.0, 0.0, 1.0, 1.0), 1.0, None, "d/a.mp4", 2),
    ]


@pytest.mark.parametrize(
    ("image_id", "file_name", "path", "expected"),
    [
        (785, None, "000000000785.jpg", True),
        (785, None, "elsewhere/785.png", True),
        (785, None, "photo785.jpg", False),
        ("street", None, "street.jpg", True),
        ("street.jpg", None, "street.jpg", True),
        ("street", None, "street", True),
        ("785", None, "000785.jpg", False),
        (785, "a.jpg", "785.jpg", False),
        (785, "val2017/a.jpg", "here/a.jpg", True),
    ],
)
def test_matching(image_id, file_name, path: str, expected: bool) -> None:
    detection = Detection((0, 0, 1, 1), 1.0, image_id, file_name)
    assert DetectionIndex([detection]).of(Path(path)) == [detection] * expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("\x00", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([{**GOOD, "bbox": [1, 2, 10**400, 4]}], "bbox of .*; expected four finite numbers"),
        ({"annotations": []}, "is an object; expected a list of COCO detections"),
        ("3", "is a number; expected a list"),
        ("null", "is null; expected a list"),
        ([GOOD, 7], "entry 1 of .* is a number; expected an object"),
        ([{"image_id": 1}], "bbox of entry 0 of .* is None; expected four finite numbers"),
        ([{**GOOD, "bbox": [1, 2, 3]}], r"is \[1, 2, 3\]; expected four"),
        ([{**GOOD, "bbox": [1, 2, "3", 4]}], "bbox of .*; expected four finite numbers"),
        ([{**GOOD, "bbox": [1, 2, float("nan"), 4]}], "bbox of .*; expected four finite numbers"),
        ([{**GOOD, "bbox": [1, 2, 0, 4]}], "bbox of .*; expected a positive width and height"),
        ([{**GOOD, "bbox": [1, 2, 3, -4]}], "bbox of .*; expected a positive width and height"),
        ([{**GOOD, "score": "high"}], "score of .* is 'high'; expected a finite number"),
        ([{**GOOD, "image_id": 1.5}], "image_id of .* is 1.5; expected an integer or a string"),
        ([{**GOOD, "file_name": 3}], "file_name of .* is 3; expected a string"),
        ([{**GOOD, "frame": -1}], "frame of .* is -1; expected an integer from 0 on"),
        ([{**GOOD, "frame": "3"}], "frame of .* is '3'; expected an integer from 0 on"),
        ([{"bbox": [0, 0, 1, 1]}], "entry 0 of .* names no image; expected an image_id"),
    ],
)
def test_bad_files(tmp_path: Path, content, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_detections(written(tmp_path, content))
    assert "boxes.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json cannot be read: No such file"):
        read_detections(tmp_path / "none.json")
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not JSON"):
        read_detections(binary)


def test_image_ids_differ() -> None:
    paths = [Path(p) for p in ("000000000002.jpg", "a.jpg", "b.jpg", "other/2.png", "1.jpg")]
    assert image_ids(paths) == [2, 3, 4, 5, 1]


def test_rescoring() -> None:
    assert person_score(0.5, [0.1, 0.2, 0.4, 0.8]) == pytest.approx(0.5 * 0.6)
    assert person_score(0.9, [0.1, 0.0]) == 0.0


def test_write_json_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(path, [1])
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, [float("nan")])
    assert json.loads(path.read_text()) == [1]
    assert list(tmp_path.iterdir()) == [path]
