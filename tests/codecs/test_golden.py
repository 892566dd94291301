"""Targets and decodings recorded from mmpose 1.3.2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kernelpose.codecs import (
    decode_heatmap,
    decode_simcc,
    encode_msra,
    encode_simcc,
    encode_udp,
    heatmap_to_input,
)
from tests.ops import checks

INPUT, HEATMAP = (256, 192), (64, 48)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    with np.load(shared / "golden" / "codecs.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


@pytest.mark.parametrize(
    ("name", "encode", "options"),
    [
        ("udp_sigma2", encode_udp, {}),
        ("msra_sigma2", encode_msra, {}),
        ("msra_unbiased_sigma2", encode_msra, {"unbiased": True}),
    ],
)
def test_heatmap_targets(golden: dict[str, Tensor], name, encode, options) -> None:
    target, weight = encode(
        golden["keypoints"],
        golden["visible"],
        input_size=INPUT,
        heatmap_size=HEATMAP,
        sigma=2.0,
        **options,
    )
    torch.testing.assert_close(target, golden[f"{name}.target"], rtol=0, atol=5e-7)
    assert torch.equal(weight, golden[f"{name}.weight"])


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton", "eager"])
@pytest.mark.parametrize(
    ("name", "mode"),
    [("udp_sigma2", "mmpose1"), ("msra_sigma2", "shift"), ("msra_unbiased_sigma2", "dark")],
)
def test_heatmap_decoding(golden: dict[str, Tensor], name: str, mode: str, backend: str) -> None:
    heatmaps = golden["heatmaps"].to(checks.device_for(backend))
    locations, scores = (x.cpu() for x in decode_heatmap(heatmaps, mode=mode, backend=backend))
    udp = name.startswith("udp")
    points = heatmap_to_input(locations, INPUT, HEATMAP, udp=udp)
    if udp:  # mmpose's unit, which its own mapping to the image divides out again
        points *= torch.tensor([192 / 191, 256 / 255])
    present = golden["heatmaps"].amax((-2, -1)) > 0
    assert present.sum() == present.numel() - 1
    expected = golden[f"{name}.decoded"].float()
    torch.testing.assert_close(points[present], expected[present], rtol=0, atol=2e-4)
    # For the map without a positive value upstream refines (-1, -1) by the memory beside the map.
    assert torch.equal(locations[~present], torch.full((1, 2), -1.0))
    assert torch.equal(scores, golden[f"{name}.scores"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("simcc_gaussian", {"sigma": (4.9, 5.66), "normalize": False}),
        ("simcc_standard", {"smoothing": "standard", "label_smooth_weight": 0.1}),
    ],
)
def test_simcc(golden: dict[str, Tensor], name: str, options) -> None:
    x, y, weight = encode_simcc(golden["keypoints"], golden["visible"], input_size=INPUT, **options)
    torch.testing.assert_close(x, golden[f"{name}.x"], rtol=0, atol=1e-6)
    torch.testing.assert_close(y, golden[f"{name}.y"], rtol=0, atol=1e-6)
    assert torch.equal(weight, golden[f"{name}.weight"])
    points, scores = decode_simcc(golden[f"{name}.logits_x"], golden[f"{name}.logits_y"])
    assert torch.equal(points, golden[f"{name}.decoded"])
    assert torch.equal(scores, golden[f"{name}.scores"])
