"""COCO's joints and MPII's."""

from __future__ import annotations

import json
import math
from pathlib import Path

from kernelpose.data.skeletons import COCO, MPII, skeleton_of


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


def test_mpii() -> None:
    """Flip pairs as every evaluation of MPII has them; limbs join all joints, and no two sides."""
    assert MPII.num_keypoints == 16
    pairs = {frozenset(pair) for pair in MPII.flip_pairs}
    assert pairs == set(map(frozenset, ((0, 5), (1, 4), (2, 3), (10, 15), (11, 14), (12, 13))))
    assert len(MPII.links) == 15
    assert {joint for link in MPII.links for joint in link} == set(range(16))
    mirrored = dict(MPII.flip_pairs) | {right: left for left, right in MPII.flip_pairs}
    links = set(map(frozenset, MPII.links))
    assert {frozenset(mirrored.get(j, j) for j in link) for link in links} == links


def test_mpii_as_annotated(shared: Path) -> None:
    """A limb is short beside its person."""
    people = json.loads((shared / "samples/mpii/annotations/mpii_val.json").read_text())
    whole = [person["joints"] for person in people if all(person["joints_vis"])]
    assert whole
    for joints in whole:
        longest = max(math.dist(joints[a], joints[b]) for a, b in MPII.links)
        assert longest < 0.5 * max(math.dist(a, b) for a in joints for b in joints)


def test_a_skeleton_by_its_number_of_joints() -> None:
    assert skeleton_of(17) is COCO
    assert skeleton_of(16) is MPII
    assert skeleton_of({"coco": 17}) is None
