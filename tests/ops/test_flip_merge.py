"""flip_merge: every backend against the reference, and the reference against its meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import kernelpose
from kernelpose.backend import OPS, choose
from kernelpose.codecs import flip_merge as in_codecs
from kernelpose.data.skeletons import COCO
from kernelpose.ops import flip_merge
from tests.ops import checks

KERNELS = ("cpu", "cuda", "triton")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]  # persons, joints, and a map
    shift: bool = False
    op: str = "flip_merge"

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Neighbours, the first joint and any last one without a partner alone."""
        return [(i, i + 1) for i in range(1, self.shape[1] - 1, 2)]

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(2, *self.shape, generator=generator, dtype=torch.float64)
        return [x.to(device=device, dtype=dtype) for x in draw]

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (inputs[0], inputs[1], self.pairs), {"shift": self.shift}

    def run(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        args, options = self.arguments(inputs)
        return flip_merge(*args, **options, backend=backend)


CASES = {
    "small": Case((2, 3, 4, 8)),
    "small-shift": Case((2, 3, 4, 8), shift=True),
    "heatmaps": Case((2, 17, 64, 48)),
    "heatmaps-shift": Case((2, 17, 64, 48), shift=True),
    "odd": Case((3, 6, 5, 37)),
    "odd-shift": Case((3, 6, 5, 37), shift=True),
    "wide": Case((1, 4, 2, 600), shift=True),
    "half-a-vector": Case((2, 5, 3, 4), shift=True),
    "logits": Case((2, 17, 384)),
    "rows": Case((2, 17, 33, 1), shift=True),
    "one-pixel": Case((1, 1, 1, 1), shift=True),
    "many-joints": Case((1, 133, 3, 16)),
    "batch-0": Case((0, 17, 64, 48)),
    "no-rows": Case((2, 17, 0, 48)),
}


@pytest.mark.parametrize(("case", "backend", "dtype"), checks.parity_matrix(CASES))
def test_parity(case: Case, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    checks.check_forward_parity(case, backend, dtype)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
@pytest.mark.parametrize("name", CASES)
def test_each_pixel_by_its_meaning(name: str, backend: str) -> None:
    """Written out: column x meets the partner's mirrored one, with a shift one further left."""
    case = CASES[name]
    heatmaps, flipped = case.inputs(torch.float32, checks.device_for(backend))
    partner = {a: b for pair in case.pairs for a, b in (pair, pair[::-1])}
    expected, width = torch.empty_like(heatmaps), case.shape[-1]
    for joint in range(case.shape[1]):
        for x in range(width):
            source = min(width - x, width - 1) if case.shift else width - 1 - x
            back = flipped[:, partner.get(joint, joint), ..., source]
            expected[:, joint, ..., x] = (heatmaps[:, joint, ..., x] + back) / 2
    assert torch.equal(case.run([heatmaps, flipped], backend), expected)


def test_a_mirrored_input_changes_nothing() -> None:
    heatmaps = torch.rand(2, 17, 6, 5)
    order = list(range(17))
    for left, right in COCO.flip_pairs:
        order[left], order[right] = right, left
    mirrored = heatmaps[:, order].flip(-1)
    assert torch.equal(in_codecs(heatmaps, mirrored, COCO.flip_pairs), heatmaps)


def test_shift_moves_right_by_one_pixel() -> None:
    flipped = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    merged = flip_merge(torch.zeros_like(flipped), flipped, [], shift=True)
    assert merged.tolist() == [[[[2.0, 2.0, 1.5, 1.0]]]]


@pytest.mark.parametrize("backend", KERNELS)
def test_half_types_are_averaged_in_float32(backend: str) -> None:
    """A sum in float16 would be infinite, or lose the last bit."""
    device = checks.device_for(backend)
    large = torch.full((1, 1, 2, 16), 60000.0, dtype=torch.float16, device=device)
    assert torch.equal(flip_merge(large, large, [], backend=backend), large)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_nan_and_infinity_go_through(backend: str) -> None:
    heatmaps = torch.zeros(1, 1, 1, 32, device=checks.device_for(backend))
    flipped = heatmaps.clone()
    heatmaps[..., 3], flipped[..., 20] = torch.nan, torch.inf
    merged = flip_merge(heatmaps, flipped, [], backend=backend).flatten().cpu()
    assert merged.isnan().nonzero().tolist() == [[3]]
    assert merged.isinf().nonzero().tolist() == [[11]]


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
@pytest.mark.parametrize("name", ["small", "small-shift"])
def test_compiles_to_one_graph(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    checks.check_compile(lambda *x: case.run(x, backend), *inputs)


def test_gradient_comes_from_eager() -> None:
    """Also where torch.compile traces the choice."""
    case = CASES["odd-shift"]
    inputs = [x.requires_grad_() for x in case.inputs(torch.float64)]
    args, options = case.arguments(inputs)
    assert choose(case.op, None, *args, **options) == "eager"
    torch.autograd.gradcheck(lambda *x: case.run(x), [x[:1, :, :1] for x in inputs])
    checks.check_compile(lambda *x: case.run(x), *inputs)
    with torch.no_grad():
        assert choose(case.op, None, *args, **options) == "cpu"
    with pytest.raises(kernelpose.BackendError, match="it has no gradient, and an input requires"):
        case.run([inputs[0].detach(), inputs[1]], "cpu")


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend: str) -> None:
    device = checks.device_for(backend)
    for name in ("small-shift", "batch-0"):
        inputs = CASES[name].inputs(torch.float32, device)
        order = [0, 2, 1, *range(3, inputs[0].shape[1])]
        args = (*inputs, order, True, backend)
        torch.library.opcheck(torch.ops.kernelpose.flip_merge.default, args)


@pytest.mark.parametrize("backend", KERNELS)
def test_export(backend: str) -> None:
    device = checks.device_for(backend)

    class Merge(torch.nn.Module):
        def forward(self, heatmaps: Tensor, flipped: Tensor) -> Tensor:
            return flip_merge(heatmaps, flipped, [(0, 1)], backend=backend)

    batch = torch.export.Dim("batch")
    inputs = torch.randn(2, 3, 2, 4, 5, device=device).unbind()
    program = torch.export.export(Merge(), inputs, dynamic_shapes=({0: batch}, {0: batch}))
    assert "kernelpose.flip_merge" in program.graph_module.code
    others = torch.randn(2, 7, 2, 4, 5, device=device).unbind()
    assert torch.equal(program.module()(*others), Merge()(*others))


@pytest.mark.parametrize("backend", KERNELS)
def test_autocast_leaves_it_alone(backend: str) -> None:
    case, device = CASES["small"], checks.device_for(backend)
    inputs = case.inputs(torch.float32, device)
    expected = case.run(inputs, backend)
    with torch.autocast(device, torch.bfloat16):
        direct = case.run(inputs, backend)
        registered = torch.ops.kernelpose.flip_merge(*inputs, [0, 1, 2], False, backend)
    assert torch.equal(direct, expected) and registered.dtype == torch.float32


@pytest.mark.parametrize("backend", KERNELS)
def test_inference_mode_and_non_contiguous_inputs(backend: str) -> None:
    case = CASES["odd-shift"]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    expected = case.run(inputs, backend)
    strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in inputs]
    assert not strided[0].is_contiguous()
    with torch.inference_mode():
        got = case.run(strided, backend)
    assert torch.equal(got, expected) and got.is_contiguous()


@pytest.mark.parametrize("backend", KERNELS)
def test_unaligned_inputs(backend: str) -> None:
    """Views that start in the middle of a vector."""
    case = CASES["small-shift"]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    moved = [torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x) for x in inputs]
    assert torch.equal(case.run(moved, backend), case.run(inputs, backend))


@pytest.mark.parametrize("backend", KERNELS)
def test_inputs_are_never_written(backend: str) -> None:
    case = CASES["small"]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    copies = [x.clone() for x in inputs]
    case.run(inputs, backend)
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_side_stream_and_graph_capture(backend: str) -> None:
    checks.check_side_stream(CASES["heatmaps-shift"], backend)
    checks.check_graph_capture(CASES["heatmaps-shift"], backend)


def test_simcc_logits_over_rows_are_maps_one_wide() -> None:
    """A mirror leaves the bins of the height where they are."""
    y, flipped = torch.randn(2, 3, 3, 33).unbind()
    merged = flip_merge(y[..., None], flipped[..., None], [(0, 2)])[..., 0]
    assert torch.equal(merged, (y + flipped[:, [2, 1, 0]]) / 2)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((1, 1025, 1, 1), "fewer than 1025 joints, and this has 1025"),
        ((2**20, 1024, 1, 1), "maps, and this has 1073741824"),
        ((1, 1, 2**15, 2**15), "pixels of a map, and this has 1073741824"),
    ],
)
def test_no_room_is_an_objection(backend: str, shape: tuple[int, ...], text: str) -> None:
    maps = torch.empty(shape, device="meta")
    reason = OPS["flip_merge"].objection(backend, maps, maps, [])
    assert reason is not None and text in reason


ZEROS = torch.zeros(1, 3, 2, 2)


@pytest.mark.parametrize(
    ("heatmaps", "flipped", "pairs", "error", "text"),
    [
        ([1.0], ZEROS, [], TypeError, "heatmaps is list; expected a tensor"),
        (ZEROS, ZEROS.long(), [], TypeError, r"flipped is torch\.int64; expected a floating"),
        (ZEROS[0, 0], ZEROS, [], ValueError, r"heatmaps has shape \(2, 2\); expected \(P, K"),
        (ZEROS, ZEROS[..., :1], [], ValueError, r"flipped has shape .*; expected .*, as heatmaps"),
        (ZEROS, ZEROS.half(), [], TypeError, r"flipped is torch\.float16; expected torch\.float32"),
        (ZEROS, ZEROS.to("meta"), [], ValueError, "flipped is on meta; expected cpu"),
        (ZEROS, ZEROS, [(1, 3)], ValueError, r"flip_pairs holds \(1, 3\); expected joints below 3"),
        (ZEROS, ZEROS, [(0, 1), (1, 2)], ValueError, r"flip_pairs holds \(1, 2\); .* joint once"),
        (ZEROS, ZEROS, torch.tensor([[0, 1], [1, 2]]), ValueError, r"flip_pairs holds \(1, 2\)"),
        (ZEROS, ZEROS, [(0.0, 1.0)], TypeError, r"flip_pairs holds \(0\.0, 1\.0\); expected pairs"),
        (ZEROS, ZEROS, [0, 1], TypeError, "flip_pairs holds 0; expected pairs of joints"),
        (ZEROS, ZEROS, [(0, 1, 2)], TypeError, r"flip_pairs holds \(0, 1, 2\); expected pairs"),
        (ZEROS, ZEROS, None, TypeError, "flip_pairs is None; expected pairs of joints"),
        (ZEROS, ZEROS, [(1, 1)], ValueError, r"flip_pairs holds \(1, 1\); expected each joint"),
    ],
)
def test_errors_name_the_argument(
    heatmaps: Any, flipped: Any, pairs: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        flip_merge(heatmaps, flipped, pairs)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
