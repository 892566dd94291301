"""COCO's joints."""

from __future__ import annotations

import json
from pathlib import Path

from kernelpose.data.skeletons import COCO


def test_coco_as_annotated(shared: Path) -> None:
    path = shared / "samples/coco/annotations/person_keypoints_val2017.json"
    category = json.loads(path.read_text())["categories"][0]
    assert list(COCO.names) == category["keypoints"]
    links = {frozenset(index - 1 for index in link) for link in category["skeleton"]}
    assert {frozenset(link) for link in COCO.links} == links


def test_sides() -> None:
    assert COCO.num_keypoints == 17
    expected = ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16))
    assert COCO.flip_pairs == expected
    assert COCO.side(5) == COCO.side(0, 1) == "left"
    assert COCO.side(6, 8) == "right"
    assert COCO.side(0) == COCO.side(5, 6) == "center"
