"""grn: every backend against the reference, and the reference against the published layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernelpose
from kernelpose.backend import OPS
from kernelpose.nn import GRN
from kernelpose.ops import grn
from tests.ops import checks
from tests.parity import assert_parity

KERNELS = ("cpu", "cuda", "triton")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]  # (B, C, H, W)
    tokens: bool = False  # as tokens lie: channels_last
    eps: float = 1e-6
    op: str = "grn"

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        wide = dtype if dtype == torch.float64 else torch.float32
        shapes = (self.shape, (self.shape[1],), (1, self.shape[1], 1, 1))
        draw = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        x, gamma, beta = (t.to(device, d) for t, d in zip(draw, (dtype, wide, wide), strict=True))
        x = x.contiguous(memory_format=torch.channels_last) if self.tokens else x
        return [x.requires_grad_() for x in (x, gamma, beta.flatten())]

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(inputs), {"eps": self.eps}

    def run(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        args, options = self.arguments(inputs)
        return grn(*args, **options, backend=backend)


CASES = {
    "small": Case((2, 8, 3, 4)),
    "small-tokens": Case((2, 8, 3, 4), tokens=True),
    "mitpose": Case((2, 768, 16, 12)),
    "mitpose-tokens": Case((2, 768, 16, 12), tokens=True),
    "odd": Case((3, 37, 5, 7)),
    "odd-tokens": Case((3, 37, 5, 7), tokens=True),
    "wide-tokens": Case((1, 2100, 3, 3), tokens=True),
    "large-eps": Case((2, 24, 4, 4), tokens=True, eps=3.0),
    "large-map": Case((1, 40, 64, 48)),
    "large-map-tokens": Case((1, 40, 64, 48), tokens=True),
    "one-pixel": Case((2, 16, 1, 1)),
    "one-channel": Case((2, 1, 4, 5)),
    "batch-0": Case((0, 8, 3, 4)),
    "no-pixels": Case((2, 8, 0, 4)),
}


@pytest.mark.parametrize(("case", "backend", "dtype"), checks.parity_matrix(CASES))
def test_parity(case: Case, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    checks.check_parity(case, backend, dtype)


def test_reference_is_the_published_layer() -> None:
    """Algorithm 1 of arXiv 2301.00808, pixel by pixel."""
    x, gamma, beta = (t.detach() for t in CASES["odd"].inputs(torch.float64))
    got = grn(x, gamma, beta, backend="eager")
    for image in range(x.shape[0]):
        norms = [sum(v * v for v in channel.flatten().tolist()) ** 0.5 for channel in x[image]]
        mean = sum(norms) / len(norms)
        for c, norm in enumerate(norms):
            expected = gamma[c] * (x[image, c] * norm / (mean + 1e-6)) + beta[c] + x[image, c]
            torch.testing.assert_close(got[image, c], expected)


@pytest.mark.parametrize("name", ["odd", "odd-tokens"])
def test_gradcheck(name: str) -> None:
    """The C++ backward in float64 against finite differences."""
    case = Case((2, 5, 2, 3), CASES[name].tokens)
    torch.autograd.gradcheck(lambda *x: case.run(x, "cpu"), case.inputs(torch.float64))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "mitpose"])
def test_memory_formats(name: str, backend: str) -> None:
    checks.check_memory_formats(CASES[name], backend)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_channels_last_and_shapes_of_parameters(backend: str) -> None:
    """The same layer with channels in front and behind, and parameters of any shape and dtype."""
    x, gamma, beta = CASES["odd"].inputs(torch.float32, checks.device_for(backend))
    expected = grn(x, gamma, beta, backend=backend)
    behind = x.detach().permute(0, 2, 3, 1).contiguous().requires_grad_()
    parameters = [p.detach().view(1, 1, 1, -1).double().requires_grad_() for p in (gamma, beta)]
    got = grn(behind, *parameters, channels_last=True, backend=backend)
    assert got.is_contiguous()
    torch.testing.assert_close(got.permute(0, 3, 1, 2), expected)
    gradients = torch.autograd.grad(got.square().sum(), [behind, *parameters])
    again = torch.autograd.grad(expected.square().sum(), [x, gamma, beta])
    torch.testing.assert_close(gradients[0].permute(0, 3, 1, 2), again[0], rtol=1e-5, atol=1e-4)
    for ours, same, parameter in zip(gradients[1:], again[1:], parameters, strict=True):
        assert ours.shape == parameter.shape and ours.dtype == torch.float64
        torch.testing.assert_close(ours.flatten().float(), same, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", KERNELS)
def test_channel_without_energy(backend: str) -> None:
    """Its norm has the gradient that PyTorch gives it, none; an image of zeros stays finite."""
    x, gamma, beta = CASES["odd-tokens"].inputs(torch.float32, checks.device_for(backend))
    with torch.no_grad():
        x[0, 3] = 0
        x[1] = 0
    results = []
    for name in (backend, "eager"):
        out = grn(x, gamma, beta, backend=name)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, gamma, beta])))
    for ours, eager in zip(*results, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", KERNELS)
def test_nan_spreads_over_its_image_alone(backend: str) -> None:
    x, gamma, beta = CASES["odd"].inputs(torch.float32, checks.device_for(backend))
    with torch.no_grad():
        x[1, 2, 3, 4] = torch.nan
    out = grn(x, gamma, beta, backend=backend)
    assert out[1].isnan().all() and out[::2].isfinite().all()


@pytest.mark.parametrize("backend", KERNELS)
def test_half_types_are_summed_in_float32(backend: str) -> None:
    """The squares of these numbers overflow float16."""
    x = torch.full((1, 16, 8, 8), 2000.0, dtype=torch.float16, device=checks.device_for(backend))
    gamma = torch.ones(16, device=x.device)
    assert torch.equal(grn(x, gamma, 0 * gamma, backend=backend), 2 * x)


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
    args = (*(x.detach().requires_grad_(grad) for x in inputs), 1e-6, backend)
    torch.library.opcheck(torch.ops.kernelpose.grn.default, args)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
@pytest.mark.parametrize("name", ["small", "small-tokens"])
def test_compiles_to_one_graph(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    checks.check_compile(lambda *x: case.run(x, backend), *inputs)


@pytest.mark.parametrize("backend", KERNELS)
def test_export(backend: str) -> None:
    """The program holds the op, and takes any batch and height."""
    device = checks.device_for(backend)
    module = GRN(8).to(device).eval()
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("height")},)
    x, other = torch.randn(2, 6, 5, 8, device=device), torch.randn(3, 9, 5, 8, device=device)
    with kernelpose.backend(backend):
        program = torch.export.export(module, (x,), dynamic_shapes=shapes)
        expected = module(other)
    assert "kernelpose.grn" in program.graph_module.code
    torch.testing.assert_close(program.module()(other), expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_autocast_leaves_it_alone(backend: str) -> None:
    checks.check_autocast_leaves_alone(CASES["small"], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_inference_mode_and_the_way_around_the_dispatcher(backend: str) -> None:
    checks.check_around_dispatcher(CASES["odd-tokens"], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_function_transforms(backend: str) -> None:
    """torch.func sees plain PyTorch, which agrees with the kernel's own backward."""
    x, gamma, beta = (
        t.detach() for t in CASES["small"].inputs(torch.float32, checks.device_for(backend))
    )

    def total(x: Tensor, name: str | None = None) -> Tensor:
        parameters = (p.to(x.dtype) for p in (gamma, beta))
        return grn(x[None], *parameters, backend=name).square().sum()

    transformed, exact = (torch.func.vmap(torch.func.grad(total))(t) for t in (x, x.double()))
    leaf = x.clone().requires_grad_()
    torch.stack([total(image, backend) for image in leaf]).sum().backward()
    assert leaf.grad is not None
    assert_parity(leaf.grad, transformed, exact)


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivative_is_refused_and_eager_has_it(backend: str) -> None:
    x, *rest = CASES["small"].inputs(torch.float32, checks.device_for(backend))
    for name in (backend, "eager"):
        out = grn(x, *rest, backend=name)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        if name == backend:
            with pytest.raises(RuntimeError, match=f"backend is '{backend}'; expected 'eager' for"):
                torch.autograd.grad(first.square().sum(), x)
        else:
            assert torch.autograd.grad(first.square().sum(), x)[0].abs().max() > 0


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", ["mitpose", "odd-tokens"])
def test_side_stream_and_graph_capture(name: str, backend: str) -> None:
    checks.check_side_stream(CASES[name], backend)
    checks.check_graph_capture(CASES[name], backend)


@pytest.mark.parametrize(
    ("backend", "shape", "what"),
    [
        ("cuda", (2**16, 2**15, 1, 1), "channels of all images"),
        ("triton", (2**16, 2**15, 1, 1), "channels of all images"),
        ("triton", (1, 2**11, 2**10, 2**10), "elements of an image"),
    ],
)
def test_no_room_is_an_objection(backend: str, shape: tuple[int, ...], what: str) -> None:
    x = torch.empty(shape, device="meta")
    reason = OPS["grn"].objection(backend, x)
    assert reason == f"it takes fewer than {2**31} {what}, and this has {2**31}"
    assert OPS["grn"].objection(backend, x[1:] if shape[0] > 1 else x[:, 1:]) is None


ZEROS = torch.zeros(2, 8, 3, 4)
EIGHT = torch.zeros(8)


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        (([1.0], EIGHT, EIGHT), {}, TypeError, "x is list; expected a tensor"),
        ((ZEROS.long(), EIGHT, EIGHT), {}, TypeError, r"x is torch\.int64; expected a floating"),
        ((ZEROS[0], EIGHT, EIGHT), {}, ValueError, r"x has shape \(8, 3, 4\); expected \(B, C, H"),
        (
            (ZEROS[0], EIGHT, EIGHT),
            {"channels_last": True},
            ValueError,
            r"x has shape .*; expected \(B, H, W, C\)",
        ),
        ((ZEROS, EIGHT, EIGHT), {"channels_last": True}, ValueError, "one element .* 4 channels"),
        ((ZEROS, None, EIGHT), {}, TypeError, "gamma is NoneType; expected a tensor"),
        ((ZEROS, EIGHT[:7], EIGHT), {}, ValueError, r"gamma has shape \(7,\); expected one elem"),
        ((ZEROS, EIGHT, EIGHT.int()), {}, TypeError, r"beta is torch\.int32; expected a float"),
        ((ZEROS, EIGHT, EIGHT.to("meta")), {}, ValueError, "beta is on meta; expected cpu, as x"),
        ((ZEROS, EIGHT, EIGHT), {"eps": "1"}, TypeError, "eps is '1'; expected a number"),
        ((ZEROS, EIGHT, EIGHT), {"eps": -1.0}, ValueError, r"eps is -1\.0; expected at least 0"),
        ((ZEROS, EIGHT, EIGHT), {"backend": "metal"}, ValueError, "backend is 'metal'"),
    ],
)
def test_errors_name_the_argument(
    args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        grn(*args, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    """Of a map of zeros beta is left, rounded to nearest, halves to even, and NaN stays NaN."""
    upper = torch.arange(-(2**31), 2**31, 2**16)
    bits = torch.cat([upper + lower for lower in (0, 0x1000, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    beta = bits.int().view(torch.float32)
    x = torch.zeros(1, beta.numel(), 1, 2, dtype=dtype).to(memory_format=torch.channels_last)
    out = grn(x, torch.zeros_like(beta), beta, backend="cpu")
    expected = beta.to(dtype).view(1, -1, 1, 1).expand_as(out)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


class TestModule:
    def test_state_dict_is_that_of_convnext_v2(self) -> None:
        shapes = {k: tuple(v.shape) for k, v in GRN(40).state_dict().items()}
        assert shapes == {"gamma": (1, 1, 1, 40), "beta": (1, 1, 1, 40)}
        shapes = {k: tuple(v.shape) for k, v in GRN(40, channels_last=False).state_dict().items()}
        assert shapes == {"gamma": (1, 40, 1, 1), "beta": (1, 40, 1, 1)}

    def test_starts_as_the_identity(self) -> None:
        x = torch.randn(2, 5, 4, 16)
        assert torch.equal(GRN(16)(x), x)

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_golden_layer_of_timm(self, channels_last: bool, shared: Path) -> None:
        golden = torch.load(shared / "golden" / "grn_timm.pt", weights_only=True)
        module = GRN(golden["input"].shape[-1], channels_last=channels_last)
        module.load_state_dict(golden["state_dict"])
        x, expected = golden["input"], golden["output"]
        if not channels_last:
            x, expected = (t.permute(0, 3, 1, 2) for t in (x, expected))
        for backend in ("cpu", "eager"):
            with torch.no_grad(), kernelpose.backend(backend):
                torch.testing.assert_close(module(x), expected, atol=2e-6, rtol=2e-6)

    def test_wrong_number_of_channels_is_an_error_of_loading(self) -> None:
        with pytest.raises(RuntimeError, match="size mismatch for gamma"):
            GRN(16).load_state_dict(GRN(8).state_dict())
