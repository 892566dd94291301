"""The flip test: a mirrored map comes back to where the original was."""

from __future__ import annotations

import pytest
import torch

from kernelpose.codecs import flip_back, flip_merge
from kernelpose.data.skeletons import COCO


def test_flip_back_undoes_a_mirror() -> None:
    heatmaps = torch.rand(2, 17, 6, 5)
    order = list(range(17))
    for left, right in COCO.flip_pairs:
        order[left], order[right] = right, left
    mirrored = heatmaps[:, order].flip(-1)
    assert torch.equal(flip_back(mirrored, COCO.flip_pairs), heatmaps)
    assert torch.equal(flip_merge(heatmaps, mirrored, COCO.flip_pairs), heatmaps)


def test_merge_is_the_mean() -> None:
    heatmaps, mirrored = torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3)
    heatmaps[0, 0, 0] = torch.tensor([1.0, 2.0, 3.0])
    mirrored[0, 1, 0] = torch.tensor([7.0, 4.0, 3.0])
    merged = flip_merge(heatmaps, mirrored, [(0, 1)])
    assert merged.tolist() == [[[[2.0, 3.0, 5.0]], [[0.0, 0.0, 0.0]]]]


def test_shift_moves_right_by_one_pixel() -> None:
    flipped = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    assert flip_back(flipped, [], shift=True).tolist() == [[[[4.0, 4.0, 3.0, 2.0]]]]


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"flip_pairs holds \(1, 3\); expected joints below 3"):
        flip_back(torch.zeros(1, 3, 2, 2), [(1, 3)])
    with pytest.raises(ValueError, match=r"flipped has shape .*; expected .*, as heatmaps"):
        flip_merge(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 3), [])
