"""decode_simcc: every backend against the reference, and the reference against its meaning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kernelpose
from kernelpose.backend import OPS
from kernelpose.codecs import heatmap_to_image
from kernelpose.ops import decode_simcc
from tests.ops import checks

KERNELS = ("cpu", "cuda", "triton")


@dataclass(frozen=True)
class Case:
    persons: int
    joints: int
    bins: tuple[int, int]
    crops: bool = False
    split_ratio: float = 2.0
    udp: bool = True
    few_values: bool = False  # many equal maxima
    op: str = "decode_simcc"

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = [(self.persons, self.joints, bins) for bins in self.bins]
        inputs = [torch.randn(s, generator=generator).mul(64).to(dtype) for s in shapes]
        if self.few_values:
            inputs = [x.sign() * (x.abs() > 16) for x in inputs]
        if self.crops:
            crops = torch.rand(2, self.persons, 2, generator=generator) * 200 + 50
            inputs += crops.unbind()
        return [x.to(device) for x in inputs]

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(inputs), {"split_ratio": self.split_ratio, "udp": self.udp}

    def run(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        """(P, K, 3): point and score."""
        args, options = self.arguments(inputs)
        points, scores = decode_simcc(*args, **options, backend=backend)
        assert points.dtype == scores.dtype == torch.float32
        return torch.cat((points, scores[..., None]), -1)


CASES = {
    "small": Case(2, 3, (24, 32)),
    "small-crops": Case(2, 3, (24, 32), crops=True),
    "small-cells": Case(2, 3, (24, 32), crops=True, udp=False),
    "input-256x192": Case(3, 17, (384, 512), crops=True),
    "odd": Case(3, 7, (389, 65), crops=True, split_ratio=1.5),
    "many-bins": Case(1, 2, (5000, 1030)),
    "equal-maxima": Case(4, 17, (384, 300), few_values=True),
    "one-bin": Case(2, 2, (1, 1)),
    "many-joints": Case(2, 133, (9, 16), crops=True, udp=False),
    "batch-0": Case(0, 17, (384, 512)),
    "batch-0-crops": Case(0, 17, (384, 512), crops=True),
    "no-joints": Case(2, 0, (384, 512), crops=True),
}


@pytest.mark.parametrize(("case", "backend", "dtype"), checks.parity_matrix(CASES))
def test_parity(case: Case, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    checks.check_forward_parity(case, backend, dtype)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_the_first_of_equal_maxima(backend: str) -> None:
    """At every place of a row, blocks and lanes crossed."""
    bins = 391
    x = torch.zeros(bins, 1, bins)
    for first in range(bins):
        x[first, 0, first::7] = 2.0
    y = x.flip(0)
    points, scores = decode_simcc(
        *(t.to(checks.device_for(backend)) for t in (x, y)), split_ratio=1.0, backend=backend
    )
    places = torch.arange(float(bins))
    assert torch.equal(points.cpu()[:, 0], torch.stack((places, places.flip(0)), -1))
    assert torch.equal(scores.cpu(), torch.full((bins, 1), 2.0))


# logits x, logits y -> point in bins, score
SPECIAL = {
    "negative": ([-1.0, -2.0], [3.0, 1.0], (-1.0, -1.0), -1.0),
    "zero": ([0.0, 0.0], [3.0, 1.0], (-1.0, -1.0), 0.0),
    "constant": ([2.0, 2.0], [1.0, 1.0], (0.0, 0.0), 1.0),
    "nan": ([1.0, math.nan], [3.0, 1.0], (-1.0, -1.0), 0.0),
    "nan-beside-negative": ([math.nan, 1.0], [-3.0, -1.0], (-1.0, -1.0), 0.0),
    "negative-nan": ([1.0, 4.0], [3.0, -math.nan], (-1.0, -1.0), 0.0),
    "infinite": ([1.0, math.inf], [3.0, 1.0], (1.0, 0.0), 3.0),
    "both-infinite": ([1.0, math.inf], [math.inf, 1.0], (1.0, 0.0), math.inf),
    "minus-infinite": ([-math.inf] * 2, [3.0, 1.0], (-1.0, -1.0), -math.inf),
}


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
@pytest.mark.parametrize("padding", [0, 6, 400])
def test_logits_without_a_peak(padding: int, backend: str) -> None:
    """What the docstring says of each; the padding moves them through the kernels' paths."""
    rows = [torch.tensor([row[axis] for row in SPECIAL.values()])[:, None] for axis in range(2)]
    x, y = (torch.cat((r, torch.full((len(r), 1, padding), -math.inf)), -1) for r in rows)
    points, scores = decode_simcc(
        *(t.to(checks.device_for(backend)) for t in (x, y)), split_ratio=2.0, backend=backend
    )
    assert (2 * points[:, 0]).tolist() == [list(row[2]) for row in SPECIAL.values()]
    assert scores[:, 0].tolist() == [row[3] for row in SPECIAL.values()]


@pytest.mark.parametrize("udp", [True, False])
def test_the_image_is_that_of_heatmaps(udp: bool) -> None:
    """Bins over split_ratio are pixels of the input, mapped as pixels of a heatmap of its size."""
    x, y, centers, scales = CASES["small-crops"].inputs(torch.float32)
    points, scores = decode_simcc(x, y)
    expected = heatmap_to_image(points, centers, scales, (16, 12), udp=udp)
    got = decode_simcc(x, y, centers, scales, udp=udp)
    torch.testing.assert_close(got, (expected, scores))
    corners = torch.full((1, 2, 24), 0.0)
    corners[0, 0, 0] = corners[0, 1, 22] = 1.0  # the first and the last pixel centre
    center, scale = torch.tensor([[300.0, 200.0]]), torch.tensor([[110.0, 220.0]])
    ends = decode_simcc(corners, corners, center, scale)[0][0]
    assert ends.tolist() == [[245.0, 90.0], [355.0, 310.0]]


def test_golden(shared: Path) -> None:
    with np.load(shared / "golden" / "codecs.npz") as file:
        golden = {k: torch.from_numpy(file[k]) for k in file if k.startswith("simcc")}
    for name in ("simcc_gaussian", "simcc_standard"):
        logits = golden[f"{name}.logits_x"], golden[f"{name}.logits_y"]
        for backend in ("cpu", "eager"):
            points, scores = decode_simcc(*logits, backend=backend)
            assert torch.equal(points, golden[f"{name}.decoded"])
            assert torch.equal(scores, golden[f"{name}.scores"])


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_results_have_no_gradient(backend: str) -> None:
    inputs = CASES["small-crops"].inputs(torch.float32, checks.device_for(backend))
    points, scores = decode_simcc(*(x.requires_grad_() for x in inputs), backend=backend)
    assert not points.requires_grad and not scores.requires_grad


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
@pytest.mark.parametrize("name", ["small", "small-crops"])
def test_compiles_to_one_graph(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    checks.check_compile(lambda *x: case.run(x, backend), *inputs)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend: str) -> None:
    for name in ("small", "small-crops", "batch-0"):
        inputs = CASES[name].inputs(torch.float32, checks.device_for(backend))
        crops = inputs[2:] or [None, None]
        args = (inputs[0], inputs[1], *crops, 2.0, True, backend)
        torch.library.opcheck(torch.ops.kernelpose.decode_simcc.default, args)


@pytest.mark.parametrize("backend", KERNELS)
def test_export(backend: str) -> None:
    device = checks.device_for(backend)

    class Decode(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return decode_simcc(x, y, backend=backend)

    batch = torch.export.Dim("batch")
    shapes = ({0: batch}, {0: batch})
    inputs = (torch.randn(2, 3, 8, device=device), torch.randn(2, 3, 10, device=device))
    program = torch.export.export(Decode(), inputs, dynamic_shapes=shapes)
    assert "kernelpose.decode_simcc" in program.graph_module.code
    others = (torch.randn(5, 3, 8, device=device), torch.randn(5, 3, 10, device=device))
    for got, expected in zip(program.module()(*others), Decode()(*others), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_inference_mode_autocast_and_non_contiguous_inputs(backend: str) -> None:
    case, device = CASES["small-crops"], checks.device_for(backend)
    inputs = case.inputs(torch.float32, device)
    expected = case.run(inputs, backend)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
        assert torch.equal(case.run(strided, backend), expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_unaligned_inputs(backend: str) -> None:
    """Views that start in the middle of a vector."""
    case = CASES["small"]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    moved = [torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x) for x in inputs]
    assert torch.equal(case.run(moved, backend), case.run(inputs, backend))


@pytest.mark.parametrize("backend", KERNELS)
def test_inputs_are_never_written(backend: str) -> None:
    case = CASES["small-crops"]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    copies = [x.clone() for x in inputs]
    case.run(inputs, backend)
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_side_stream_and_graph_capture(backend: str) -> None:
    checks.check_side_stream(CASES["input-256x192"], backend)
    checks.check_graph_capture(CASES["input-256x192"], backend)


def test_no_room_is_an_objection() -> None:
    for name in KERNELS:
        x = torch.empty(1, 1, 2**24, device="meta")
        reason = OPS["decode_simcc"].objection(name, x, x[..., :4], None, None)
        assert reason is not None and "bins along an axis, and this has 16777216" in reason
    for name in KERNELS[1:]:
        x = torch.empty(2**20, 2**10, 2, device="meta")
        reason = OPS["decode_simcc"].objection(name, x, x, None, None)
        assert reason is not None and "joints of all persons, and this has 1073741824" in reason


X, PAIRS = torch.zeros(2, 3, 8), torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        (([1.0], X), {}, TypeError, "x is list; expected a tensor"),
        ((X, X.long()), {}, TypeError, r"y is torch\.int64; expected a floating-point"),
        ((X[0], X), {}, ValueError, r"x has shape \(3, 8\); expected \(P, K, bins\)"),
        ((X, X[..., :0]), {}, ValueError, r"y has shape \(2, 3, 0\); expected .*bins >= 1"),
        ((X, X[:1]), {}, ValueError, r"y has shape \(1, 3, 8\); expected \(2, 3, 'bins'\)"),
        ((X, X.half()), {}, TypeError, r"y is torch\.float16; expected torch\.float32, as x"),
        ((X, X.to("meta")), {}, ValueError, "y is on meta; expected cpu"),
        ((X, X), {"split_ratio": 0}, ValueError, "split_ratio is 0; expected a positive"),
        ((X, X, PAIRS), {}, TypeError, "scales is NoneType; expected .* go together"),
        ((X, X, None, PAIRS), {}, TypeError, "centers is NoneType; expected"),
        ((X, X, PAIRS[:1], PAIRS), {}, ValueError, r"centers has shape \(1, 2\); .*\(2, 2\)"),
        ((X, X, PAIRS, PAIRS.to("meta")), {}, ValueError, "scales is on meta; expected cpu"),
        ((X, X[..., :2], PAIRS, PAIRS), {}, ValueError, "y has 2 bins; expected more than split"),
        ((X, X), {"backend": "torch"}, kernelpose.BackendError, "has no torch backend"),
        ((X.double(), X.double()), {"backend": "cpu"}, kernelpose.BackendError, "float64"),
    ],
)
def test_errors_name_the_argument(
    args: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        decode_simcc(*args, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
