"""Every decoder against one joint at a time in numpy, and the maps that nothing can be read of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernelpose.codecs import DECODE_MODES, decode_heatmap

PADDING = {"mmpose1": "constant", "mmpose0": "reflect", "transformers": "symmetric"}


def random_heatmaps(batch: int, joints: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    """Noise under a blob of random place and width, some of it over the edge."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    low, high = torch.tensor([-1.0, -1.0]), torch.tensor([width + 1.0, height + 1.0])
    center = low + torch.rand(batch, joints, 2, generator=generator) * (high - low)
    sigma = 1 + 2 * torch.rand(batch, joints, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    squares = (x - center[..., :1, None]) ** 2 + (y - center[..., 1:, None]) ** 2
    noise = 0.02 * torch.randn(batch, joints, height, width, generator=generator)
    return torch.exp(-squares / (2 * sigma**2)) + noise


def gaussian(kernel: int, sigma: float) -> np.ndarray:
    x = np.arange(kernel) - kernel // 2
    values = np.exp(-(x**2) / (2 * sigma**2))
    return values / values.sum()


def blur(heatmap: np.ndarray, mode: str, kernel: int) -> np.ndarray:
    sigma = 0.8 if mode == "transformers" else 0.3 * ((kernel - 1) * 0.5 - 1) + 0.8
    weights = gaussian(kernel, sigma)
    padded = np.pad(heatmap, kernel // 2, mode=PADDING[mode])
    rows = np.apply_along_axis(np.convolve, 1, padded, weights, mode="valid")
    blurred = np.apply_along_axis(np.convolve, 0, rows, weights, mode="valid")
    return blurred * (heatmap.max() / blurred.max()) if mode == "mmpose1" else blurred


def newton(heatmap: np.ndarray, mode: str, kernel: int) -> tuple[np.ndarray, float]:
    """The peak, and how far off float32 may put it."""
    y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
    logs = np.pad(np.log(np.clip(blur(heatmap, mode, kernel), 1e-3, 50)), 1, mode="edge")
    near = logs[y : y + 3, x : x + 3]
    gradient = 0.5 * np.array([near[1, 2] - near[1, 0], near[2, 1] - near[0, 1]])
    xx = near[1, 2] - 2 * near[1, 1] + near[1, 0]
    yy = near[2, 1] - 2 * near[1, 1] + near[0, 1]
    xy = 0.5 * (
        near[2, 2] - near[1, 2] - near[2, 1] + 2 * near[1, 1]
        - near[1, 0] - near[0, 1] + near[0, 0]
    )  # fmt: skip
    hessian = np.array([[xx, xy], [xy, yy]]) + np.finfo(np.float32).eps * np.eye(2)
    step = -np.linalg.solve(hessian, gradient)
    # Float32 leaves the blurred logarithms off by some eps, and the flatter the peak, the further
    # that carries. Where clipping made it level, it carries nothing: hence the cap.
    off = 4 * np.finfo(np.float32).eps * (1 + np.abs(near).max())
    flatness = 1 / np.abs(np.linalg.eigvalsh(hessian)).min()
    return np.array([x, y]) + step, min(off * flatness * (1 + np.abs(step).max()), 5e-4)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("kernel", [9, 11, 17])
@pytest.mark.parametrize("mode", list(PADDING))
def test_newton_modes(mode: str, kernel: int, backend: str) -> None:
    heatmaps = random_heatmaps(3, 5, (20, 15), seed=kernel)
    # Down to and up to where the logarithm's clipping at 1e-3 and 50 bends the peak.
    heatmaps *= torch.tensor([1.0, 0.003, 0.0016, 55.0, 200.0])[:, None, None]
    locations, scores = decode_heatmap(heatmaps, mode=mode, kernel=kernel, backend=backend)
    for person in range(3):
        for joint in range(5):
            heatmap = heatmaps[person, joint].double().numpy()
            expected, allowed = newton(heatmap, mode, kernel)
            np.testing.assert_allclose(locations[person, joint], expected, rtol=0, atol=allowed)
            assert scores[person, joint] == heatmaps[person, joint].max()


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_binomial_kernel_of_small_blurs(backend: str) -> None:
    """OpenCV takes a fixed table up to 7 wide, not the formula; a far smaller map than kernel."""
    heatmaps = torch.zeros(1, 1, 5, 5)
    heatmaps[0, 0, 2, 2], heatmaps[0, 0, 2, 3] = 1.0, 0.5
    locations, _ = decode_heatmap(heatmaps, mode="mmpose0", kernel=3, backend=backend)
    # Blurred row: 1/8, 5/8 of .5 ... : values .25, .625, .5 of the peak's column weight.
    left, middle, right = math.log(0.25), math.log(0.625), math.log(0.5)
    step = 0.5 * (right - left) / (2 * middle - left - right)
    assert locations[0, 0, 0] == pytest.approx(2 + step, abs=1e-5)
    small = heatmaps[..., 1:4, 1:4]
    wide = decode_heatmap(small, mode="transformers", kernel=11, backend=backend)[0]
    assert wide.isfinite().all()


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_shift_moves_a_quarter_towards_the_higher_neighbour(backend: str) -> None:
    heatmaps = torch.zeros(1, 3, 8, 8)
    heatmaps[0, :, 4, 4] = 1.0
    heatmaps[0, 0, 4, 5], heatmaps[0, 0, 3, 4] = 0.5, 0.4
    heatmaps[0, 1, 4, 3] = 0.5
    heatmaps[0, 2, 0, 7] = 2.0
    locations, _ = decode_heatmap(heatmaps, mode="shift", backend=backend)
    expected = torch.tensor([[4.25, 3.75], [3.75, 4.0], [7.0, 0.0]])
    assert torch.equal(locations[0], expected)
    argmax, _ = decode_heatmap(heatmaps, mode="argmax", backend=backend)
    assert torch.equal(argmax[0], torch.tensor([[4.0, 4.0], [4.0, 4.0], [7.0, 0.0]]))


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("mode", DECODE_MODES)
def test_maps_without_a_peak(mode: str, backend: str) -> None:
    heatmaps = random_heatmaps(1, 6, (16, 12), seed=1)
    heatmaps[0, 1] = 0
    heatmaps[0, 2] = -heatmaps[0, 2].abs() - 0.1
    heatmaps[0, 3, 2, 2] = float("nan")
    heatmaps[0, 4, 2, 2] = float("inf")
    locations, scores = decode_heatmap(heatmaps, mode=mode, backend=backend)
    assert torch.equal(locations[0, 1:5], torch.full((4, 2), -1.0))
    assert scores[0, 1:5].tolist() == [0.0, pytest.approx(float(heatmaps[0, 2].max())), 0.0, 0.0]
    alone, _ = decode_heatmap(heatmaps[:, [0, 5]], mode=mode, backend=backend)
    torch.testing.assert_close(locations[:, [0, 5]], alone)
    assert (scores[0, [0, 5]] > 0).all()


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("mode", DECODE_MODES)
def test_constant_maps_and_no_persons(mode: str, backend: str) -> None:
    locations, _ = decode_heatmap(torch.full((1, 1, 8, 6), 0.5), mode=mode, backend=backend)
    assert locations.isfinite().all()
    locations, scores = decode_heatmap(torch.zeros(0, 17, 64, 48), mode=mode, backend=backend)
    assert locations.shape == (0, 17, 2)
    assert scores.shape == (0, 17)


def test_indices_do_not_overflow_float32() -> None:
    """At 40 persons of 133 joints the flat index passes 2^24, where float32 skips integers."""
    person = random_heatmaps(1, 133, (64, 48), seed=2)
    expected, _ = decode_heatmap(person, mode="shift")
    locations, _ = decode_heatmap(person.expand(42, -1, -1, -1), mode="shift")
    assert torch.equal(locations, expected.expand(42, -1, -1))


@pytest.mark.parametrize("mode", DECODE_MODES)
def test_nothing_is_computed_in_reduced_precision(mode: str) -> None:
    """On a GPU, convolutions and matrix products may round their factors to TF32."""
    called: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    with Names():
        decode_heatmap(random_heatmaps(1, 3, (16, 12), seed=0), mode=mode, backend="eager")
    assert "aten.max.dim" in called
    reducible = ("conv", "mm", "matmul", "addmv", "linear", "einsum")
    assert not [name for name in called if any(word in name for word in reducible)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    heatmaps = random_heatmaps(2, 3, (16, 12), seed=3).to(dtype)
    locations, scores = decode_heatmap(heatmaps)
    expected, expected_scores = decode_heatmap(heatmaps.float())
    assert torch.equal(locations, expected)
    assert torch.equal(scores, expected_scores)


def test_a_view_decodes_like_its_copy() -> None:
    heatmaps = random_heatmaps(2, 3, (16, 12), seed=4)
    view = heatmaps.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(decode_heatmap(view)[0], decode_heatmap(heatmaps)[0])
