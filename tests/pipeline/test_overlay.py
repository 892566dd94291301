"""Drawn skeletons: where the joints are, in the colour of their side, as sure as their scores."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("PIL")

from kernelpose.data.figure import draw_figure
from kernelpose.data.skeletons import COCO
from kernelpose.pipeline.overlay import SIDE_COLORS, Person, draw_poses

FIGURE = draw_figure()


def person(scores: float, keypoints: np.ndarray = FIGURE.keypoints) -> Person:
    return Person(keypoints, np.full(17, scores), scores)


def test_limbs_have_the_colour_of_their_side() -> None:
    image = np.full((640, 480, 3), 128, np.uint8)
    drawn = draw_poses(image, [person(1.0)])
    assert (image == 128).all()
    for a, b in ((5, 7), (7, 9), (6, 8), (11, 13), (12, 14), (11, 12)):
        x, y = np.rint(FIGURE.keypoints[[a, b]].mean(0)).astype(int)
        color = np.array(SIDE_COLORS[COCO.side(a, b)])
        assert np.abs(drawn[y, x].astype(int) - color).max() <= 10, COCO.names[a]
    untouched = (drawn == 128).all(-1)
    assert untouched[500:, :100].all()
    assert untouched.mean() > 0.8


def test_doubtful_joints_are_fainter() -> None:
    image = np.full((640, 480, 3), 128, np.uint8)
    changes = []
    for score in (0.0, 0.3, 0.6, 0.9):
        # A limb apart from the tag, whose text changes.
        drawn = draw_poses(image, [person(score)])[250:].astype(int)
        changes.append(np.abs(drawn - 128).sum())
    assert changes == sorted(changes)
    assert changes[0] > 0
    assert changes[3] > 3 * changes[0]


def test_nobody_and_somebody_out_of_the_picture() -> None:
    assert np.array_equal(draw_poses(FIGURE.image, []), FIGURE.image)
    far = person(0.9, FIGURE.keypoints + 5000)
    drawn = draw_poses(FIGURE.image, [far])
    changed = (drawn != FIGURE.image).any(-1)
    assert changed.mean() < 0.05  # its tag, at the picture's edge
    point = person(0.9, np.full((17, 2), 100.0))
    assert draw_poses(FIGURE.image, [point]).shape == FIGURE.image.shape
    tiny = draw_poses(np.zeros((3, 2, 3), np.uint8), [person(0.9)])
    assert tiny.shape == (3, 2, 3)
