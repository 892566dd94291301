"""decode_heatmap: every backend against the reference, on ordinary maps and on special ones.

What the reference itself has to give is in tests/codecs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import kernelpose
from kernelpose.backend import OPS, TRITON_INTERPRETED
from kernelpose.ops import decode_heatmap
from kernelpose.reference.decode_heatmap import DECODE_MODES, heatmap_to_image, locate
from tests.codecs.test_decode import random_heatmaps
from tests.ops import checks
from tests.parity import assert_parity

KERNELS = ("cpu", "cuda", "triton")
EXACT = ("shift", "argmax")  # nothing is rounded


@dataclass(frozen=True)
class Case:
    size: tuple[int, int]
    mode: str = "mmpose1"
    kernel: int = 11
    udp: bool = True
    crops: bool = True
    peak: float = 1.0
    persons: int = 3
    joints: int = 5
    op: str = "decode_heatmap"

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        heatmaps = self.peak * random_heatmaps(self.persons, self.joints, self.size, seed=5)
        generator = torch.Generator().manual_seed(6)
        centers = 500 * torch.rand(self.persons, 2, generator=generator)
        scales = 100 + 200 * torch.rand(self.persons, 2, generator=generator)
        inputs = [heatmaps.to(device=device, dtype=dtype)]
        return [*inputs, centers.to(device), scales.to(device)] if self.crops else inputs

    def arguments(self, inputs: list[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        return tuple(inputs), {"mode": self.mode, "kernel": self.kernel, "udp": self.udp}

    def run(self, inputs: list[Tensor], backend: str | None = None) -> Tensor:
        """(P, K, 3): keypoints and scores."""
        args, options = self.arguments(inputs)
        keypoints, scores = decode_heatmap(*args, **options, backend=backend)
        return torch.cat((keypoints, scores[..., None]), -1)

    def exact(self, inputs: list[Tensor]) -> Tensor:
        """The reference in float64."""
        heatmaps, *crops = (x.double() for x in inputs)
        points, scores = locate(heatmaps, self.mode, self.kernel)
        if crops:
            points = heatmap_to_image(points, *crops, self.size, udp=self.udp)
        return torch.cat((points, scores[..., None]), -1)


CASES = {mode: Case((20, 15), mode) for mode in DECODE_MODES} | {
    "vitpose": Case((64, 48), crops=False),
    "vitpose-dark": Case((64, 48), "dark", udp=False, persons=1),
    "wide-kernel": Case((24, 18), "mmpose0", kernel=17),
    "widest-kernel": Case((64, 48), "mmpose1", kernel=63, persons=1),
    "no-blur": Case((12, 9), "mmpose1", kernel=1, udp=False),
    "binomial": Case((12, 9), "mmpose0", kernel=5, crops=False),
    "kernel-above-map": Case((5, 7), "mmpose1", kernel=17),
    "kernel-above-map-mirrored": Case((4, 3), "mmpose0", kernel=7),
    "kernel-above-map-symmetric": Case((4, 5), "transformers", kernel=21),
    "aligned": Case((16, 32), "transformers", joints=1),
    "large": Case((96, 72), "mmpose1", persons=1, joints=2),
    "faint": Case((40, 50), crops=False, peak=0.003, persons=1, joints=2),  # clipped at its peak
    "faint-dark": Case((40, 50), "dark", crops=False, peak=1e-9, persons=1, joints=2),
    "two-rows": Case((2, 9), "transformers", crops=False),
    "one-pixel": Case((1, 1), "mmpose1", udp=False),
    "no-persons": Case((8, 6), persons=0),
    "no-joints": Case((8, 6), joints=0),
}


@pytest.mark.parametrize(("case", "backend", "dtype"), checks.parity_matrix(CASES))
def test_parity(case: Case, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    check_parity(case, backend, dtype)


def check_parity(case: Case, backend: str, dtype: torch.dtype) -> None:
    device = checks.device_for(backend)
    if backend == "triton" and TRITON_INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("triton: its interpreter computes bfloat16 wrongly")
    inputs = case.inputs(dtype, device)
    kept = [x.clone() for x in inputs]
    got, eager = case.run(inputs, backend), case.run(inputs, "eager")
    assert got.dtype == torch.float32 and got.shape == (case.persons, case.joints, 3)
    assert_parity(got, eager, case.exact([inputs[0].float(), *inputs[1:]]))
    if got.numel():
        assert torch.equal(got[..., 2], eager[..., 2])
        assert torch.equal(got, case.run(inputs, backend))
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("mode", DECODE_MODES)
def test_a_single_row(mode: str, backend: str) -> None:
    """Across it the Hessian is nothing but rounding; along it the peak is as good as ever."""
    maps = random_heatmaps(3, 5, (1, 20), seed=4).to(checks.device_for(backend))
    for turned, axis in ((maps, 0), (maps.transpose(2, 3), 1)):
        got, expected = (
            decode_heatmap(turned, mode=mode, backend=b)[0] for b in (backend, "eager")
        )
        assert got.isfinite().all()
        torch.testing.assert_close(got[..., axis], expected[..., axis], rtol=0, atol=1e-4)


def special_maps() -> Tensor:
    """(1, 12, 9, 7): maps with nothing to find, or with more than one thing."""
    maps = random_heatmaps(1, 12, (9, 7), seed=8)[0]
    maps[0] = 0.0
    maps[1] = 0.5
    maps[2] = -maps[2].abs() - 0.1
    maps[3, 8, 6] = float("nan")
    maps[4] = float("nan")
    maps[5, 0, 3] = float("inf")
    maps[6] = float("-inf")
    maps[7, 4, 4] = float("-inf")  # one pixel alone does not spoil its map
    maps[8].clamp_(max=0.3)  # a plateau: the first of the equal ones
    maps[9] = 0.0
    maps[9, 2, 5] = maps[9, 5, 1] = 0.7
    maps[10] = 0.0
    maps[10, 8, 6] = 1e-30  # below what the logarithm's clipping lets through
    maps[11] = -3.0
    maps[11, 4, 3] = 2e-3  # a peak that the blur drowns
    return maps[None]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("mode", DECODE_MODES)
def test_special_maps(mode: str, backend: str) -> None:
    maps = special_maps().to(checks.device_for(backend))
    (got, scores), (expected, expected_scores) = (
        decode_heatmap(maps, mode=mode, backend=name) for name in (backend, "eager")
    )
    assert torch.equal(scores, expected_scores)
    assert got.isfinite().all()
    absent = [0, 2, 3, 4, 5, 6]
    assert torch.equal(got[0, absent], torch.full((6, 2), -1.0, device=got.device))
    assert scores[0, [3, 4, 5, 6]].tolist() == [0.0] * 4
    if mode in EXACT:
        assert torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)


OUTSHONE = {"mmpose1": 3e-3, "dark": 3e-10}  # modes that rescale: a height near their clipping


def outshone_map(mode: str) -> Tensor:
    """(1, 1, 40, 50): the peak at (35, 30) is one pixel, a hill at (10, 35) little lower but broad.

    Once blurred, the hill is ten times as high, and what the rescaling to it leaves of the peak is
    clipped to a plain: no step. Rescaled to itself, the peak would move to the right.
    """
    y, x = torch.meshgrid(torch.arange(40), torch.arange(50), indexing="ij")
    heatmap = 0.9 * torch.exp(-((x - 10) ** 2 + (y - 35) ** 2) / 32.0)
    heatmap[30, 35], heatmap[30, 36] = 1.0, 0.5
    return OUTSHONE[mode] * heatmap[None, None]


@pytest.mark.parametrize("backend", (*KERNELS, "eager"))
@pytest.mark.parametrize("mode", OUTSHONE)
def test_a_faint_peak_beside_a_broad_hill(mode: str, backend: str) -> None:
    faint = outshone_map(mode).to(checks.device_for(backend))
    points, _ = decode_heatmap(faint, mode=mode, backend=backend)
    assert points[0, 0].tolist() == [35.0, 30.0]
    bright, _ = decode_heatmap(100 * faint, mode=mode, backend=backend)
    assert bright[0, 0, 0] > 35.1  # nothing is clipped any more


@pytest.mark.parametrize("backend", (*KERNELS, "eager"))
def test_of_equal_maxima_the_first_counts(backend: str) -> None:
    maps = torch.zeros(1, 40, 9, 7, device=checks.device_for(backend))
    generator = torch.Generator().manual_seed(9)
    first = []
    for joint in range(40):
        pixels = torch.randperm(63, generator=generator)[: 1 + joint % 5]
        maps[0, joint].view(-1)[pixels] = 0.25
        first.append(int(pixels.min()))
    points, _ = decode_heatmap(maps, mode="argmax", backend=backend)
    x, y = points[0].unbind(-1)
    assert (y * 7 + x).tolist() == first


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("mode", ["mmpose1", "shift"])
def test_a_crowd_decodes_as_person_by_person(mode: str, backend: str) -> None:
    """1,000 persons of 133 joints: 2**29 bytes, pixels whose index float32 could not hold."""
    device = checks.device_for(backend)
    if backend == "triton" and TRITON_INTERPRETED:
        pytest.skip("triton: the interpreter would take hours")
    persons, joints = 1000, 133
    few = random_heatmaps(3, joints, (64, 48), seed=2).to(device, torch.float16)
    crops = [100 * torch.rand(persons, 2, device=device) + 50 for _ in range(2)]
    maps = few[torch.arange(persons, device=device) % 3]
    points, scores = decode_heatmap(maps, *crops, mode=mode, backend=backend)
    del maps
    for person in (*range(0, persons, 97), persons - 2, persons - 1):
        one = few[person % 3][None], *(crop[person][None] for crop in crops)
        alone, score = decode_heatmap(*one, mode=mode, backend=backend)
        assert torch.equal(points[person], alone[0]) and torch.equal(scores[person], score[0])


@pytest.mark.parametrize("backend", KERNELS)
def test_inference_mode_autocast_and_non_contiguous_inputs(backend: str) -> None:
    case, device = CASES["mmpose0"], checks.device_for(backend)
    inputs = case.inputs(torch.float32, device)
    expected = case.run(inputs, backend)
    strided = [
        inputs[0].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        *(torch.stack((x, x), -1)[..., 0] for x in inputs[1:]),
    ]
    assert not any(x.is_contiguous() for x in strided)
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
        assert torch.equal(case.run(strided, backend), expected)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_unaligned_inputs(dtype: torch.dtype, backend: str) -> None:
    """Views that start in the middle of a vector."""
    case = CASES["aligned"]
    inputs = case.inputs(dtype, checks.device_for(backend))
    moved = [torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x) for x in inputs]
    assert torch.equal(case.run(moved, backend), case.run(inputs, backend))


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
@pytest.mark.parametrize("name", ["transformers", "binomial"])
def test_compiles_to_one_graph(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    checks.check_compile(lambda *x: case.run(x, backend), *inputs)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend: str) -> None:
    for name in ("mmpose1", "binomial", "no-persons"):
        case = CASES[name]
        inputs = case.inputs(torch.float32, checks.device_for(backend))
        crops = inputs[1:] or [None, None]
        args = (inputs[0], *crops, case.mode, case.kernel, case.udp, backend)
        torch.library.opcheck(torch.ops.kernelpose.decode_heatmap.default, args)


@pytest.mark.parametrize("backend", KERNELS)
def test_export(backend: str) -> None:
    device = checks.device_for(backend)

    class Decode(torch.nn.Module):
        def forward(self, heatmaps: Tensor) -> tuple[Tensor, Tensor]:
            return decode_heatmap(heatmaps, backend=backend)

    example = random_heatmaps(2, 3, (8, 6), seed=0).to(device)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Decode(), (example,), dynamic_shapes=shapes)
    assert "kernelpose.decode_heatmap" in program.graph_module.code
    others = random_heatmaps(5, 3, (8, 6), seed=1).to(device)
    for got, expected in zip(program.module()(others), Decode()(others), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_side_stream_and_graph_capture(backend: str) -> None:
    checks.check_side_stream(CASES["vitpose"], backend)
    checks.check_graph_capture(CASES["vitpose"], backend)


@pytest.mark.parametrize("backend", (*KERNELS, "eager"))
def test_results_carry_no_gradient_and_float64_crops_are_taken(backend: str) -> None:
    case = CASES["mmpose1"]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    wide = [inputs[0].clone().requires_grad_(), *(x.double().requires_grad_() for x in inputs[1:])]
    got = case.run(wide, backend)
    assert not got.requires_grad and got.dtype == torch.float32
    assert torch.equal(got, case.run(inputs, backend))


def test_same_whatever_the_threads() -> None:
    before = torch.get_num_threads()
    inputs = CASES["vitpose"].inputs(torch.float32)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(CASES["vitpose"].run(inputs, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_reaching_the_image() -> None:
    """The corners of the map are those of the crop: centres of pixels under UDP, else cells."""
    maps = torch.zeros(1, 2, 8, 6)
    maps[0, 0, 0, 0] = maps[0, 1, 7, 5] = 1.0
    crop = torch.tensor([[100.0, 50.0]]), torch.tensor([[60.0, 80.0]])
    points, _ = decode_heatmap(maps, *crop, mode="argmax")
    assert points[0].tolist() == [[70.0, 10.0], [130.0, 90.0]]
    points, _ = decode_heatmap(maps, *crop, mode="argmax", udp=False)
    assert points[0].tolist() == [[70.0, 10.0], [120.0, 80.0]]


MAPS, CROP = torch.zeros(2, 1, 4, 4), torch.ones(2, 2)


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        (
            (torch.zeros(17, 64, 48),),
            {},
            ValueError,
            r"heatmaps has shape \(17, 64, 48\); expected",
        ),
        ((torch.zeros(1, 17, 0, 48),), {}, ValueError, r"\(1, 17, 0, 48\); expected .* h, w >= 1"),
        ((MAPS.int(),), {}, TypeError, r"heatmaps is torch\.int32; expected a floating"),
        (([1.0],), {}, TypeError, "heatmaps is list; expected a tensor"),
        ((MAPS,), {"mode": "best"}, ValueError, "mode is 'best'; expected one of mmpose1"),
        ((MAPS,), {"kernel": 4}, ValueError, "kernel is 4; expected a positive odd"),
        ((MAPS,), {"kernel": 5.0}, ValueError, r"kernel is 5\.0; expected a positive odd"),
        ((MAPS, CROP), {}, TypeError, "scales is NoneType; expected .* go together"),
        ((MAPS, None, CROP), {}, TypeError, "centers is NoneType; expected .* go together"),
        ((MAPS, CROP[:1], CROP), {}, ValueError, r"centers has shape \(1, 2\); expected \(2, 2\)"),
        ((MAPS, CROP, CROP.int()), {}, TypeError, r"scales is torch\.int32; expected a floating"),
        ((MAPS, CROP, CROP.to("meta")), {}, ValueError, "scales is on meta; expected cpu"),
        ((MAPS[..., :1], CROP, CROP), {}, ValueError, r"\(2, 1, 4, 1\); expected h, w >= 2 .* UDP"),
        (
            (MAPS,),
            {"kernel": 65, "backend": "cpu"},
            kernelpose.BackendError,
            "cannot: its blur is at most 63 pixels wide, and this is 65",
        ),
    ],
)
def test_errors_name_the_argument(
    args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        decode_heatmap(*args, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_what_the_kernels_have_no_room_for() -> None:
    def objection(backend: str, *shape: int, **options: Any) -> str | None:
        spec = OPS["decode_heatmap"]
        return spec.objection(backend, torch.empty(*shape, device="meta"), **options)

    assert objection("cpu", 1, 1, 2**15, 2**15) == (
        "it takes fewer than 1073741824 pixels of a map, and this has 1073741824"
    )
    assert "joints of all persons" in str(objection("cuda", 2**20, 2**11, 1, 1))
    assert objection("cuda", 2**20, 2**11 - 1, 1, 1) is None
    assert objection("cuda", 1, 1, 8, 8, mode="argmax", kernel=65) is None
    wide = random_heatmaps(1, 2, (12, 9), seed=1)
    assert decode_heatmap(wide, kernel=65)[0].isfinite().all()
