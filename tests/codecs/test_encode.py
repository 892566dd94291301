"""Targets: what their definitions say, and that decoding takes them back."""

from __future__ import annotations

import math

import pytest
import torch

from kernelpose.codecs import (
    decode_heatmap,
    decode_simcc,
    encode_msra,
    encode_simcc,
    encode_udp,
    heatmap_to_image,
    heatmap_to_input,
    input_to_heatmap,
)

SIZES = {"input_size": (256, 192), "heatmap_size": (64, 48)}


def inner_keypoints(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 40 + torch.rand(1, count, 2, generator=generator) * torch.tensor([110.0, 170.0])


@pytest.mark.parametrize(
    ("encode", "mode", "udp", "tolerance"),
    [
        (lambda *a: encode_udp(*a, **SIZES), "mmpose1", True, 0.02),
        (lambda *a: encode_udp(*a, **SIZES), "transformers", True, 0.2),
        (lambda *a: encode_msra(*a, **SIZES, unbiased=True), "dark", False, 0.02),
        (lambda *a: encode_msra(*a, **SIZES), "argmax", False, 2.0),
    ],
)
def test_decoding_takes_targets_back(encode, mode: str, udp: bool, tolerance: float) -> None:
    keypoints = inner_keypoints(40)
    heatmaps, weights = encode(keypoints, torch.ones(1, 40))
    locations, scores = decode_heatmap(heatmaps, mode=mode)
    points = heatmap_to_input(locations, **SIZES, udp=udp)
    assert (points - keypoints).abs().max() <= tolerance
    assert torch.equal(weights, torch.ones(1, 40))
    assert (scores > 0.93).all()


def test_udp_target_is_the_gaussian_of_its_definition() -> None:
    heatmaps, _ = encode_udp(torch.tensor([[[80.0, 100.0]]]), torch.ones(1, 1), **SIZES)
    mu_x, mu_y = 80 * 47 / 191, 100 * 63 / 255
    for y in range(64):
        for x in range(48):
            inside = abs(x - round(mu_x)) <= 6 and abs(y - round(mu_y)) <= 6
            value = math.exp(-((x - mu_x) ** 2 + (y - mu_y) ** 2) / 8) if inside else 0.0
            assert heatmaps[0, 0, y, x] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("encode", [encode_udp, encode_msra])
def test_joints_that_cannot_be_drawn(encode) -> None:
    keypoints = torch.tensor(
        [
            [
                [80.0, 100.0],
                [80.0, 100.0],
                [-100.0, 50.0],
                [60.0, 400.0],
                [math.nan, 3.0],
                [-100.0, 0.0],
            ]
        ]
    )
    visible = torch.tensor([[1.0, 0.3, 2.0, 1.0, 1.0, 0.4]])
    heatmaps, weights = encode(keypoints, visible, **SIZES)
    assert weights.tolist() == [[1.0, pytest.approx(0.3), 0.0, 0.0, 0.0, pytest.approx(0.4)]]
    assert heatmaps[0, 0].max() > 0.9
    assert torch.equal(heatmaps[0, 1:], torch.zeros(5, 64, 48))


def test_simcc_targets_and_back() -> None:
    keypoints, visible = inner_keypoints(10), torch.ones(1, 10)
    visible[0, 3] = 0
    x, y, weights = encode_simcc(keypoints, visible, input_size=(256, 192))
    assert x.shape == (1, 10, 384)
    assert y.shape == (1, 10, 512)
    drawn = visible[0] > 0
    assert (x.sum(-1)[0, drawn] - 1).abs().max() < 1e-3  # a density, none of it over the edge
    assert torch.equal(weights, visible)
    points, _ = decode_simcc(x, y)
    assert (points - keypoints)[0, drawn].abs().max() <= 0.25 + 1e-5
    assert torch.equal(points[0, 3], torch.tensor([-0.5, -0.5]))


def test_simcc_logits_without_a_peak() -> None:
    x, y = torch.randn(1, 3, 8).abs(), torch.randn(1, 3, 6).abs()
    x[0, 0], y[0, 1, 2] = -1.0, math.nan
    points, scores = decode_simcc(x, y, split_ratio=1.0)
    assert torch.equal(points[0, :2], torch.full((2, 2), -1.0))
    assert scores[0, :2].tolist() == [-1.0, 0.0]
    assert points[0, 2].tolist() == [float(x[0, 2].argmax()), float(y[0, 2].argmax())]


@pytest.mark.parametrize("udp", [True, False])
def test_coordinates(udp: bool) -> None:
    points = inner_keypoints(6)
    there = input_to_heatmap(points, **SIZES, udp=udp)
    torch.testing.assert_close(heatmap_to_input(there, **SIZES, udp=udp), points)
    center, scale = torch.tensor([[300.0, 200.0]]), torch.tensor([[150.0, 200.0]])
    end = torch.tensor([[[47.0, 63.0]]]) if udp else torch.tensor([[[48.0, 64.0]]])
    ends = torch.cat((torch.zeros(1, 1, 2), end), 1)
    in_image = heatmap_to_image(ends, center, scale, (64, 48), udp=udp)
    torch.testing.assert_close(in_image, torch.tensor([[[225.0, 100.0], [375.0, 300.0]]]))


@pytest.mark.parametrize(
    ("keypoints", "visible", "message"),
    [
        (torch.zeros(17, 2), torch.ones(17), r"keypoints is .*\(17, 2\); expected"),
        (
            torch.zeros(1, 17, 2).long(),
            torch.ones(1, 17),
            "keypoints is torch.int64 .*; expected a floating",
        ),
        (torch.zeros(1, 17, 2), torch.ones(1, 16), r"visible has .*\(1, 16\); expected \(1, 17\)"),
    ],
)
def test_errors_name_the_argument(keypoints, visible, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_udp(keypoints, visible, **SIZES)
    with pytest.raises(ValueError, match=message):
        encode_simcc(keypoints, visible, input_size=(256, 192))
