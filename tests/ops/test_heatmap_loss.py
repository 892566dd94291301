"""heatmap_loss: every backend against the reference, and the reference against the maths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernelpose
from kernelpose.backend import OPS
from kernelpose.codecs import encode_msra, encode_udp
from kernelpose.ops import heatmap_loss
from kernelpose.pipeline import plain
from tests.ops import checks

Pair = tuple[int, int]
KERNELS = ("cpu", "cuda", "triton")


@dataclass(frozen=True)
class Case:
    size: Pair = (64, 48)
    input_size: Pair = (256, 192)
    codec: str = "udp"
    sigma: float = 2.0
    batch: int = 2
    joints: int = 9
    crossing: bool = False
    op: str = "heatmap_loss"

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.joints, *self.size)
        pred = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
        return [pred.to(device=device, dtype=dtype).requires_grad_()]

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float64 else torch.float32

    def labels(self, device: Any) -> tuple[Tensor, Tensor]:
        """Joints within the map, over its edges and outside, labelled or not, some of them NaN;
        or joints that cross the map, along x and then y, from outside to outside."""
        if self.crossing:
            keypoints = torch.full((self.batch, self.joints, 2), 16.0)
            half = self.joints // 2
            path = 2.0 * torch.arange(half) - 24  # half pixels of the map: where windows change
            keypoints[:, :half, 0], keypoints[:, half:, 1] = path, path
            return keypoints.to(device), torch.ones(self.batch, self.joints, device=device)
        generator = torch.Generator().manual_seed(1)
        edge = torch.tensor(self.input_size[::-1])
        keypoints = torch.rand(self.batch, self.joints, 2, generator=generator) * edge
        weights = torch.tensor([1.0, 2.0, 0.3, 0.0, 1.0, 1.0, 1.0, 0.7, 1.0])
        visible = weights.repeat(self.batch, -(-self.joints // 9))[:, : self.joints].clone()
        special = {2: (math.nan, 3.0), 3: (math.nan, math.nan), 4: (0.4, -1.0)}
        special |= {5: (-5.0 * self.input_size[1], 3.0), 6: (3.0, math.inf), 7: (math.nan, 3.0)}
        for joint, place in special.items():
            if joint < self.joints:
                keypoints[:, joint] = torch.tensor(place)
        return keypoints.to(device), visible.to(device)

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        options = {"input_size": self.input_size, "sigma": self.sigma, "codec": self.codec}
        return (inputs[0], *self.labels(inputs[0].device)), options

    def run(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        args, options = self.arguments(inputs)
        return heatmap_loss(*args, **options, backend=backend)


CASES = {
    "udp": Case(),
    "msra": Case(codec="msra"),
    "unbiased": Case(codec="unbiased"),
    "odd": Case((13, 7), (50, 31), sigma=1.3),
    "odd-msra": Case((9, 21), (36, 80), "msra", sigma=0.7),
    "odd-unbiased": Case((5, 3), (20, 11), "unbiased", sigma=2.6),
    "wide": Case((3, 150), (12, 600), sigma=3.2, batch=1),
    "small": Case((8, 8), (32, 32), sigma=1.0, joints=3),
    "crossing": Case((9, 9), (33, 33), sigma=1.0, batch=1, joints=86, crossing=True),
    "crossing-msra": Case((9, 9), (36, 36), "msra", 0.7, batch=1, joints=86, crossing=True),
    "crossing-unbiased": Case((9, 9), (36, 36), "unbiased", 1.0, 1, joints=86, crossing=True),
    "pixels-of-halves": Case((2, 2), (8, 8), joints=4),
    "one-pixel": Case((1, 1), (4, 4), "msra", joints=2),
    "one-joint": Case((16, 12), (64, 48), batch=1, joints=1),
    "no-joints": Case((16, 12), (64, 48), joints=0),
    "batch-0": Case((16, 12), (64, 48), batch=0),
}


@pytest.mark.parametrize(("case", "backend", "dtype"), checks.parity_matrix(CASES))
def test_parity(case: Case, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    if case.batch * case.joints:
        checks.check_parity(case, backend, dtype)
        return
    pred = case.inputs(dtype, checks.device_for(backend))
    loss = case.run(pred, backend)
    assert loss.isnan() and loss.dtype == case.output_dtype(dtype)
    assert F.mse_loss(pred[0], pred[0]).isnan()  # as PyTorch's own
    assert torch.autograd.grad(loss, pred)[0].shape == pred[0].shape


@pytest.mark.parametrize("backend", KERNELS)
def test_large_maps_lose_no_digits(backend: str) -> None:
    """A million squares, too many for one running sum in float32."""
    checks.check_parity(Case((1024, 1024), (4096, 4096), batch=1, joints=2), backend, torch.float32)


def _window(center: float, nearest: int, sigma: float) -> tuple[int, int, int]:
    """First pixel, end, and the pixel that the Gaussian is centred on before it is shifted."""
    first, end = math.trunc(nearest - 3 * sigma), math.trunc(nearest + 3 * sigma + 1)
    return first, end, first + int((6 * sigma + 1) // 2)


@pytest.mark.parametrize(
    "name",
    ["small", "odd", "odd-msra", "odd-unbiased", *(n for n in CASES if n.startswith("crossing"))],
)
def test_reference_is_its_definition(name: str) -> None:
    """Pixel by pixel in plain Python, from the papers' formulas."""
    case = CASES[name]
    (pred,) = case.inputs(torch.float64)
    keypoints, visible = (t.tolist() for t in case.labels("cpu"))
    end = 1 if case.codec == "udp" else 0
    total = 0.0
    for person, joint in np.ndindex(case.batch, case.joints):
        weight, profiles, reached = visible[person][joint], [], True
        for axis in (1, 0):  # y, x
            size, place = case.size[1 - axis], keypoints[person][joint][axis]
            center = place * (size - end) / (case.input_size[1 - axis] - end)
            if not math.isfinite(center):
                reached, profiles = False, [*profiles, [0.0] * size]
                continue
            first, last, middle = _window(center, math.trunc(center + 0.5), case.sigma)
            if case.codec == "unbiased":
                low, high, peak = center - 3 * case.sigma, center + 3 * case.sigma + 1, center
                first, last = 0, size
            else:
                low, high, peak = first, last, middle
                if case.codec == "udp":
                    peak += center - math.trunc(center + 0.5)
            reached &= low < size and high >= 0
            gaussian = [math.exp(-((i - peak) ** 2) / (2 * case.sigma**2)) for i in range(size)]
            profiles.append([g if first <= i < last else 0.0 for i, g in enumerate(gaussian)])
        labelled = weight >= 0.5
        if labelled and not reached:
            continue
        for y, x in np.ndindex(*case.size):
            target = profiles[0][y] * profiles[1][x] if labelled else 0.0
            total += weight * (pred[person, joint, y, x].item() - target) ** 2
    expected = total / pred.numel()
    assert case.run([pred], "eager").item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("codec", ["udp", "msra", "unbiased"])
def test_is_encoding_and_then_a_weighted_squared_error(codec: str) -> None:
    case = CASES[codec]
    (pred,) = case.inputs(torch.float32)
    sizes = {"input_size": case.input_size, "heatmap_size": case.size}
    if codec == "udp":
        targets, weights = encode_udp(*case.labels("cpu"), **sizes)
    else:
        targets, weights = encode_msra(*case.labels("cpu"), **sizes, unbiased=codec == "unbiased")
    assert set(weights.unique().tolist()) > {0.0, 1.0, 2.0}  # not the same as weights squared
    # mmpose.models.KeypointMSELoss, 1.x
    squares = F.mse_loss(pred, targets, reduction="none")
    expected = (squares * weights[..., None, None]).mean()
    torch.testing.assert_close(case.run([pred], "eager"), expected)
    torch.testing.assert_close(
        torch.autograd.grad(case.run([pred], "eager"), pred),
        torch.autograd.grad(expected, pred),
    )


@pytest.mark.parametrize("codec", ["udp", "msra", "unbiased"])
def test_targets_that_mmpose_recorded(shared: Path, codec: str) -> None:
    name = {"udp": "udp", "msra": "msra", "unbiased": "msra_unbiased"}[codec] + "_sigma2"
    with np.load(shared / "golden" / "codecs.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file}
    targets, weights = golden[f"{name}.target"], golden[f"{name}.weight"]
    torch.manual_seed(0)
    pred = torch.rand(targets.shape)
    expected = (weights.double()[..., None, None] * (pred.double() - targets) ** 2).mean()
    for backend in ("cpu", "eager"):
        loss = heatmap_loss(
            pred, golden["keypoints"], golden["visible"], input_size=(256, 192), codec=codec,
            backend=backend,
        )  # fmt: skip
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_agrees_with_the_plain_path() -> None:
    """Which draws the windows of mmpose a joint at a time, in numpy."""
    case = CASES["udp"]
    (pred,) = case.inputs(torch.float32)
    keypoints, visible = case.labels("cpu")
    keypoints[~keypoints.isfinite()] = 1e4  # it casts them to integers
    targets, weights = plain.udp_targets(
        keypoints.numpy(), visible.numpy(), input_size=case.input_size, heatmap_size=case.size
    )
    squares = F.mse_loss(pred, torch.from_numpy(targets), reduction="none")
    expected = (squares * torch.from_numpy(weights)[..., None, None]).mean()
    torch.testing.assert_close(case.run([pred], "cpu"), expected)


@pytest.mark.parametrize("name", ["small", "odd", "odd-msra", "odd-unbiased"])
def test_gradcheck(name: str) -> None:
    """The C++ backward in float64 against finite differences."""
    case = CASES[name]
    torch.autograd.gradcheck(lambda *x: case.run(x, "cpu"), case.inputs(torch.float64))


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_what_does_not_count_may_be_anything(backend: str) -> None:
    device = checks.device_for(backend) if backend != "eager" else "cpu"
    pred, keypoints = torch.zeros(1, 3, 8, 6, device=device), torch.full((1, 3, 2), 8.0)
    keypoints[0, 1] = -1e6  # outside the map, though visible
    visible = torch.tensor([[0.0, 1.0, 1.0]], device=device)
    keypoints = keypoints.to(device)

    def run() -> tuple[Tensor, Tensor]:
        leaf = pred.clone().requires_grad_()
        options = {"input_size": (32, 24), "backend": backend}
        loss = heatmap_loss(leaf, keypoints, visible, **options)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    clean = run()
    pred[0, 0, 2, 3], pred[0, 1] = torch.nan, torch.inf
    assert all(torch.equal(a, b) for a, b in zip(run(), clean, strict=True))
    assert torch.equal(clean[1][0, :2], torch.zeros_like(clean[1][0, :2]))
    leaf = pred.clone().requires_grad_()
    loss = heatmap_loss(leaf, keypoints, visible, input_size=(32, 24), backend=backend)
    (overflown,) = torch.autograd.grad(loss * torch.inf, leaf)  # as a scaler may find it
    assert torch.equal(overflown[0, :2], clean[1][0, :2]) and overflown[0, 2].isinf().any()
    pred[0, 2, 0, 0] = torch.nan
    loss, gradient = run()
    assert loss.isnan() and gradient.isnan().sum() == 1


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_labels_of_any_dtype_have_no_gradient(backend: str) -> None:
    device = checks.device_for(backend) if backend != "eager" else "cpu"
    pred = torch.rand(2, 3, 16, 12, device=device, requires_grad=True)
    keypoints = (torch.arange(12.0, device=device) * 4).view(2, 3, 2)
    visible = torch.tensor([[1, 0, 1], [0, 1, 1]], device=device)
    leaves = keypoints.double().requires_grad_(), visible.float().requires_grad_()
    expected = heatmap_loss(pred, *leaves, input_size=(64, 48), backend=backend)
    expected.backward()
    assert all(leaf.grad is None for leaf in leaves)
    for points, labels in ((keypoints.half(), visible.bool()), (keypoints, visible)):
        loss = heatmap_loss(pred, points, labels, input_size=(64, 48), backend=backend)
        assert torch.equal(loss, expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_scaled_loss_keeps_the_gradients_of_half(backend: str) -> None:
    """Gradients of a mean lie below what float16 holds; a scaler's factor lifts them."""
    case = Case((64, 48), batch=4)
    inputs = case.inputs(torch.float16, checks.device_for(backend))
    lost, kept = (
        torch.autograd.grad(case.run(inputs, backend) * scale, inputs)[0]
        for scale in (1.0, 2.0**16)
    )
    wide = [inputs[0].detach().double().requires_grad_()]
    exact = torch.autograd.grad(case.run(wide, "eager") * 2.0**16, wide)[0]
    torch.testing.assert_close(kept.double(), exact, rtol=2e-3, atol=1e-7)
    counted = exact.abs() > 1e-4
    assert (kept[counted] != 0).all() and (lost[counted] == 0).any()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "odd"])
def test_non_contiguous_input(name: str, backend: str) -> None:
    case = CASES[name]
    (pred,) = case.inputs(torch.float32, checks.device_for(backend))
    keypoints, visible = case.labels(pred.device)
    _, options = case.arguments([pred])
    expected = heatmap_loss(pred, keypoints, visible, **options, backend=backend)
    strided = pred.detach().to(memory_format=torch.channels_last).requires_grad_()
    turned = keypoints.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not (strided.is_contiguous() or turned.is_contiguous())
    got = heatmap_loss(strided, turned, visible.t().contiguous().t(), **options, backend=backend)
    assert torch.equal(got, expected)
    gradients = (torch.autograd.grad(*pair)[0] for pair in ((got, strided), (expected, pred)))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("first", [1, 3])
def test_a_part_of_a_larger_tensor(first: int, backend: str) -> None:
    """Contiguous, but at an address that is no multiple of a vector."""
    case = Case((8, 8), (32, 32), batch=1, joints=4)
    (pred,) = case.inputs(torch.float16, checks.device_for(backend))
    memory = torch.zeros(first + pred.numel(), dtype=pred.dtype, device=pred.device)
    memory[first:] = pred.detach().flatten()
    part = memory[first:].view(pred.shape).requires_grad_()
    assert part.is_contiguous()
    expected, got = (case.run([x], backend) for x in (pred, part))
    torch.testing.assert_close(got, expected)
    gradients = (torch.autograd.grad(*pair)[0] for pair in ((got, part), (expected, pred)))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["udp", "odd", "small"])
def test_deterministic_whatever_the_threads(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    before = torch.get_num_threads()
    results: list[tuple[Tensor, ...]] = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            output = case.run(inputs, backend)
            results.append((output, *torch.autograd.grad(output, inputs)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_inputs_are_never_written(backend: str) -> None:
    (pred,) = CASES["small"].inputs(torch.float32, checks.device_for(backend))
    given = (pred, *CASES["small"].labels(pred.device))
    copies = [x.detach().clone() for x in given]
    heatmap_loss(*given, input_size=(32, 32), backend=backend).backward()
    assert all(
        torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
        for x, y in zip(given, copies, strict=True)
    )


PRED, POINTS, VISIBLE = torch.zeros(2, 3, 8, 6), torch.zeros(2, 3, 2), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"pred": [0.0]}, TypeError, "pred is list; expected a tensor"),
        ({"pred": PRED.long()}, TypeError, r"pred is torch\.int64; expected a floating-point"),
        ({"pred": PRED[0]}, ValueError, r"pred has shape \(3, 8, 6\); expected \(B, K, h, w\)"),
        ({"pred": PRED[..., :0]}, ValueError, r"pred has shape \(2, 3, 8, 0\)"),
        ({"pred": PRED[..., :1]}, ValueError, "pred has maps of 8 x 1; expected at least 2 x 2"),
        ({"keypoints": POINTS.long()}, TypeError, r"keypoints is torch\.int64; expected"),
        (
            {"keypoints": torch.zeros(2, 3, 3)},
            ValueError,
            r"keypoints has shape \(2, 3, 3\); expected \(2, 3, 2\) for pred of shape",
        ),
        ({"visible": VISIBLE[:1]}, ValueError, r"visible has shape \(1, 3\); expected \(2, 3\)"),
        ({"visible": None}, TypeError, "visible is NoneType; expected a tensor"),
        ({"visible": VISIBLE.to("meta")}, ValueError, "visible is on meta; expected cpu, as pred"),
        ({"input_size": 256}, ValueError, r"input_size is 256; expected \(height, width\)"),
        ({"input_size": (1, 24)}, ValueError, r"input_size is \(1, 24\); .* at least 2"),
        ({"input_size": (0, 24), "codec": "msra"}, ValueError, r"input_size is .* at least 1"),
        ({"input_size": (32.0, 24.0)}, ValueError, r"input_size is \(32\.0, 24\.0\)"),
        ({"sigma": 0}, ValueError, "sigma is 0; expected a finite number above 0"),
        ({"sigma": math.nan}, ValueError, "sigma is nan; expected a finite number"),
        ({"sigma": "2"}, TypeError, "sigma is '2'; expected a number"),
        ({"codec": "dark"}, ValueError, "codec is 'dark'; expected one of udp, msra, unbiased"),
        ({"backend": "metal"}, ValueError, "backend is 'metal'"),
        (
            {"backend": "cuda"},
            kernelpose.BackendError,
            "backend is 'cuda'; expected one that can run heatmap_loss, .* cannot: it runs",
        ),
    ],
)
def test_errors_name_the_argument(
    changed: dict[str, Any], error: type[Exception], text: str
) -> None:
    given = {"pred": PRED, "keypoints": POINTS, "visible": VISIBLE, "input_size": (32, 24)}
    with pytest.raises(error, match=text) as caught:
        heatmap_loss(**{**given, **changed})
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("what", "backends", "within", "beyond"),
    [
        ("pixels of a map", ("cpu", "triton"), (2**12, 2**12 - 1), (2**12, 2**12)),
        ("rows and columns of a map together", ("cuda",), (12280, 7), (12280, 8)),
    ],
)
def test_no_room_is_an_objection(
    what: str, backends: Sequence[str], within: Pair, beyond: Pair
) -> None:
    for backend in backends:
        reasons = []
        for size in (within, beyond):
            pred = torch.empty(1, 2, *size, device="meta")
            reasons.append(OPS["heatmap_loss"].objection(backend, pred, POINTS, VISIBLE))
        assert reasons[0] is None
        assert reasons[1] is not None and f" {what}, and this has " in reasons[1]
