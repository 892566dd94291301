"""The drawn person: repeatable, and with joints where they are said to be."""

from __future__ import annotations

import numpy as np

from kernelpose.data import raster
from kernelpose.data.figure import draw_figure
from kernelpose.data.skeletons import COCO


def test_same_pixels_every_time() -> None:
    first, second = draw_figure(), draw_figure()
    assert first.image.dtype == np.uint8
    assert first.image.shape == (640, 480, 3)
    assert np.array_equal(first.image, second.image)


def test_joints_and_box_enclose_what_is_drawn() -> None:
    figure = draw_figure()
    assert figure.keypoints.shape == (17, 2)
    x, y, width, height = figure.box
    inside = (figure.keypoints > (x, y)) & (figure.keypoints < (x + width, y + height))
    assert inside.all()
    # Outside the box nothing but the smooth wall and floor: no strong horizontal edges.
    edges = np.abs(np.diff(figure.image.astype(int), axis=1)).max(-1)
    outside = np.ones(edges.shape, bool)
    outside[int(y) : int(y + height), int(x) : int(x + width)] = False
    assert edges[outside].max() <= 8
    assert edges[~outside].max() > 60


def test_each_joint_lies_on_the_figure() -> None:
    """Skin, shirt and trousers are where the joints say; the wall behind is grey-blue."""
    figure = draw_figure()
    expected = {
        "wrist": lambda r, g, b: r > b + 30,  # skin
        "ear": lambda r, g, b: r > b + 30,
        "elbow": lambda r, g, b: r > b + 30,
        "shoulder": lambda r, g, b: g > r + 30,  # shirt
        "knee": lambda r, g, b: b > r + 10 and b < 130,  # trousers
        "ankle": lambda r, g, b: b > r + 10 and b < 130,
        "eye": lambda r, g, b: max(r, g, b) < 90,  # pupil
    }
    for name, (x, y) in zip(COCO.names, figure.keypoints.astype(int), strict=True):
        check = expected.get(name.split("_")[-1])
        if check is not None:
            assert check(*figure.image[y, x].astype(int)), name


def test_signed_distances() -> None:
    part = (slice(0, 21), slice(0, 31))
    positions = raster.grid(part)
    a, b = np.array([5.0, 10.0]), np.array([25.0, 10.0])
    capsule = raster.capsule(positions, a, b, 4.0, 4.0)
    assert capsule[10, 15] == -4.0
    assert capsule[2, 15] == 4.0
    assert capsule[10, 0] == 1.0
    ellipse = raster.ellipse(positions, np.array([15.0, 10.0]), np.array([10.0, 5.0]))
    np.testing.assert_allclose(ellipse[[10, 10, 5], [25, 5, 15]], 0, atol=1e-5)
    assert np.isfinite(ellipse).all()
    assert ellipse[10, 15] < -1
    square = np.array([[5, 5], [25, 5], [25, 15], [5, 15]], np.float32)
    polygon = raster.polygon(positions, square, 2.0)
    assert polygon[10, 15] == -7.0
    assert polygon[10, 30] == 3.0
    assert np.array_equal(raster.coverage(np.array([-2.0, 0.0, 2.0])), [1.0, 0.5, 0.0])
