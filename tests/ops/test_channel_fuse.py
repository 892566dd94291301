"""channel_fuse: every backend against the reference, and the reference against its meaning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import kernelpose
from kernelpose.backend import OPS
from kernelpose.ops import channel_fuse
from tests.ops import checks
from tests.parity import assert_parity

KERNELS = ("cpu", "cuda", "triton")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]  # (B, C, H, W)
    tokens: bool = False  # as tokens lie: channels_last
    softmax: str = "joint"
    op: str = "channel_fuse"

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """Maps whose channels' means differ."""
        generator = torch.Generator().manual_seed(0)
        maps = torch.randn(2, *self.shape, generator=generator, dtype=torch.float64)
        maps += torch.randn(2, *self.shape[:2], 1, 1, generator=generator, dtype=torch.float64)
        layout = torch.channels_last if self.tokens else torch.contiguous_format
        return [y.to(device, dtype).contiguous(memory_format=layout).requires_grad_() for y in maps]

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(inputs), {"softmax": self.softmax}

    def run(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        args, options = self.arguments(inputs)
        return channel_fuse(*args, **options, backend=backend)


CASES = {
    "small": Case((2, 8, 3, 4)),
    "small-tokens": Case((2, 8, 3, 4), tokens=True, softmax="pairwise"),
    "mitpose": Case((2, 768, 16, 12), softmax="pairwise"),
    "mitpose-tokens": Case((2, 768, 16, 12), tokens=True),
    "odd": Case((3, 37, 5, 7)),
    "odd-pairwise": Case((3, 37, 5, 7), softmax="pairwise"),
    "odd-tokens": Case((3, 37, 5, 7), tokens=True),
    "odd-tokens-pairwise": Case((3, 37, 5, 7), tokens=True, softmax="pairwise"),
    "wide-tokens": Case((1, 2100, 3, 3), tokens=True),
    "large-map": Case((1, 24, 64, 48)),
    "large-map-tokens": Case((1, 24, 64, 48), tokens=True),
    "one-pixel": Case((2, 16, 1, 1)),
    "one-channel": Case((2, 1, 4, 5)),
    "batch-0": Case((0, 8, 3, 4)),
    "no-pixels": Case((2, 8, 0, 4)),
}


@pytest.mark.parametrize(("case", "backend", "dtype"), checks.parity_matrix(CASES))
def test_parity(case: Case, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    checks.check_parity(case, backend, dtype)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
@pytest.mark.parametrize("softmax", ["joint", "pairwise"])
def test_meaning_channel_by_channel(softmax: str, backend: str) -> None:
    case = Case((2, 5, 3, 4), softmax=softmax)
    inputs = [y.detach() for y in case.inputs(torch.float32, checks.device_for(backend))]
    got = case.run(inputs, backend)
    for image, (a, b) in enumerate(zip(*inputs, strict=True)):
        exponentials = [[math.exp(y[c].mean().item()) for c in range(5)] for y in (a, b)]
        for c in range(5):
            e1, e2 = exponentials[0][c], exponentials[1][c]
            total = sum(map(sum, exponentials)) if softmax == "joint" else e1 + e2
            torch.testing.assert_close(got[image, c], e1 / total * a[c] + e2 / total * b[c])


@pytest.mark.parametrize("name", ["odd", "odd-pairwise", "odd-tokens", "odd-tokens-pairwise"])
def test_gradcheck(name: str) -> None:
    """The C++ backward in float64 against finite differences."""
    case = Case((2, 5, 2, 3), CASES[name].tokens, CASES[name].softmax)
    torch.autograd.gradcheck(lambda *y: case.run(y, "cpu"), case.inputs(torch.float64))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "mitpose"])
def test_memory_formats(name: str, backend: str) -> None:
    checks.check_memory_formats(CASES[name], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_maps_of_two_formats(backend: str) -> None:
    """The result has the format of y1."""
    y1, y2 = (y.detach() for y in CASES["odd"].inputs(torch.float32, checks.device_for(backend)))
    last = y2.contiguous(memory_format=torch.channels_last)
    got = channel_fuse(y1, last, backend=backend)
    assert got.is_contiguous() and torch.equal(got, channel_fuse(y1, y2, backend=backend))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("softmax", ["joint", "pairwise"])
def test_far_means_and_nan(softmax: str, backend: str) -> None:
    """Exponentials do not overflow; a NaN spreads as far as the softmax goes."""
    y1, y2 = (y.detach() for y in CASES["odd"].inputs(torch.float32, checks.device_for(backend)))
    for sign in (1, -1):
        far = [sign * 500 + y for y in (y1, 2 * y2)]
        ours, eager = (channel_fuse(*far, softmax=softmax, backend=b) for b in (backend, "eager"))
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    y1[1, 2, 3, 4] = torch.nan
    ours, eager = (channel_fuse(y1, y2, softmax=softmax, backend=b) for b in (backend, "eager"))
    assert torch.equal(ours.isnan(), eager.isnan()) and not ours[0].isnan().any()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "odd-tokens", "mitpose", "mitpose-tokens"])
def test_deterministic_whatever_the_threads(name: str, backend: str) -> None:
    checks.check_deterministic(CASES[name], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_inputs_are_never_written_wherever_they_start(backend: str) -> None:
    """Views that start in the middle of a vector give what others give."""
    checks.check_inputs_kept(CASES["small"], backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "small-tokens", "batch-0", "no-pixels"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(name: str, grad: bool, backend: str) -> None:
    inputs = CASES[name].inputs(torch.float32, checks.device_for(backend))
    args = (*(y.detach().requires_grad_(grad) for y in inputs), CASES[name].softmax, backend)
    torch.library.opcheck(torch.ops.kernelpose.channel_fuse.default, args)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
@pytest.mark.parametrize("name", ["small", "small-tokens"])
def test_compiles_to_one_graph(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    checks.check_compile(lambda *y: case.run(y, backend), *inputs)


class _Fuse(torch.nn.Module):
    def forward(self, y1: Tensor, y2: Tensor) -> Tensor:
        return channel_fuse(y1, y2)


@pytest.mark.parametrize("backend", KERNELS)
def test_export(backend: str) -> None:
    """The program holds the op, and takes any batch and height."""
    device = checks.device_for(backend)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height")}
    given = torch.randn(2, 2, 8, 6, 5, device=device).unbind()
    others = torch.randn(2, 3, 8, 9, 5, device=device).unbind()
    with kernelpose.backend(backend):
        program = torch.export.export(_Fuse(), given, dynamic_shapes=(sizes, sizes))
        expected = channel_fuse(*others)
    assert "kernelpose.channel_fuse" in program.graph_module.code
    torch.testing.assert_close(program.module()(*others), expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_autocast_leaves_it_alone(backend: str) -> None:
    checks.check_autocast_leaves_alone(CASES["small"], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_inference_mode_and_the_way_around_the_dispatcher(backend: str) -> None:
    checks.check_around_dispatcher(CASES["odd-tokens"], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_function_transforms(backend: str) -> None:
    """torch.func sees plain PyTorch, which agrees with the kernel's own backward."""
    inputs = CASES["small"].inputs(torch.float32, checks.device_for(backend))
    y1, y2 = (y.detach() for y in inputs)

    def total(a: Tensor, b: Tensor, name: str | None = None) -> Tensor:
        return channel_fuse(a[None], b[None], backend=name).square().sum()

    transformed, exact = (
        torch.func.vmap(torch.func.grad(total))(a, b)
        for a, b in ((y1, y2), (y1.double(), y2.double()))
    )
    leaf = y1.clone().requires_grad_()
    torch.stack([total(a, b, backend) for a, b in zip(leaf, y2, strict=True)]).sum().backward()
    assert leaf.grad is not None
    assert_parity(leaf.grad, transformed, exact)


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivative_is_refused_and_eager_has_it(backend: str) -> None:
    y1, y2 = CASES["small"].inputs(torch.float32, checks.device_for(backend))
    for name in (backend, "eager"):
        out = channel_fuse(y1, y2, backend=name)
        (first,) = torch.autograd.grad(out.square().sum(), y1, create_graph=True)
        if name == backend:
            with pytest.raises(RuntimeError, match=f"backend is '{backend}'; expected 'eager' for"):
                torch.autograd.grad(first.square().sum(), y1)
        else:
            assert torch.autograd.grad(first.square().sum(), y1)[0].abs().max() > 0


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", ["mitpose", "odd-tokens"])
def test_side_stream_and_graph_capture(name: str, backend: str) -> None:
    checks.check_side_stream(CASES[name], backend)
    checks.check_graph_capture(CASES[name], backend)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_no_room_is_an_objection(backend: str) -> None:
    y = torch.empty(2**16, 2**15, 1, 1, device="meta")
    reason = OPS["channel_fuse"].objection(backend, y, y)
    assert reason == f"it takes fewer than {2**31} channels of all images, and this has {2**31}"
    assert OPS["channel_fuse"].objection(backend, y[1:], y[1:]) is None


ZEROS = torch.zeros(2, 8, 3, 4)


@pytest.mark.parametrize(
    ("y1", "y2", "options", "error", "text"),
    [
        ([1.0], ZEROS, {}, TypeError, "y1 is list; expected a tensor"),
        (ZEROS, ZEROS.long(), {}, TypeError, r"y2 is torch\.int64; expected a floating"),
        (ZEROS[0], ZEROS, {}, ValueError, r"y1 has shape \(8, 3, 4\); expected \(B, C, H, W\)"),
        (ZEROS, ZEROS[:1], {}, ValueError, r"y2 has shape \(1, 8, 3, 4\); expected \(2, 8, 3, 4\)"),
        (ZEROS, ZEROS.half(), {}, TypeError, r"y2 is torch\.float16; expected torch\.float32"),
        (ZEROS, ZEROS.to("meta"), {}, ValueError, "y2 is on meta; expected cpu, as y1"),
        (ZEROS, ZEROS, {"softmax": "both"}, ValueError, "softmax is 'both'; expected 'joint' or"),
        (ZEROS, ZEROS, {"backend": "metal"}, ValueError, "backend is 'metal'"),
    ],
)
def test_errors_name_the_argument(
    y1: Any, y2: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        channel_fuse(y1, y2, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
