"""dual_gate: every backend against the reference, and the reference against the published gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelpose.ops import dual_gate
from tests.ops import checks
from tests.parity import assert_parity

KERNELS = ("cpu", "cuda", "triton")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]  # (B, C, H, W)
    hidden: int
    tokens: bool = False  # as tokens lie: channels_last
    op: str = "dual_gate"

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        wide = dtype if dtype == torch.float64 else torch.float32
        channels = self.shape[1]
        shapes = (self.shape, (self.hidden, channels, 1, 1), (channels, self.hidden, 1, 1))
        draw = [
            torch.randn(s, generator=generator, dtype=torch.float64)
            for s in (*shapes, (1, 2, 7, 7))
        ]
        y, *weights = draw
        y = y.to(device, dtype)
        y = y.contiguous(memory_format=torch.channels_last) if self.tokens else y
        scaled = (w / w[0].numel() ** 0.5 for w in weights)
        return [x.requires_grad_() for x in (y, *(w.to(device, wide) for w in scaled))]

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(inputs), {}

    def run(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        return dual_gate(*inputs, backend=backend)


CASES = {
    "small": Case((2, 8, 3, 4), 2),
    "small-tokens": Case((2, 8, 3, 4), 2, tokens=True),
    "mitpose": Case((2, 768, 16, 12), 48),
    "mitpose-tokens": Case((2, 768, 16, 12), 48, tokens=True),
    "odd": Case((3, 37, 5, 7), 5),
    "odd-tokens": Case((3, 37, 5, 7), 5, tokens=True),
    "wide-tokens": Case((1, 2100, 3, 3), 70, tokens=True),
    "large-map": Case((1, 40, 64, 48), 3),
    "large-map-tokens": Case((1, 40, 64, 48), 3, tokens=True),
    "one-pixel": Case((2, 16, 1, 1), 4),
    "one-channel": Case((2, 1, 4, 5), 1),
    "batch-0": Case((0, 8, 3, 4), 2),
}


@pytest.mark.parametrize(("case", "backend", "dtype"), checks.parity_matrix(CASES))
def test_parity(case: Case, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    checks.check_parity(case, backend, dtype)


def test_reference_is_the_published_gates() -> None:
    """The modules of the CBAM paper's code, with one y for both."""
    y, *weights = (t.detach() for t in CASES["odd"].inputs(torch.float64))
    channel = nn.Sequential(
        nn.Conv2d(37, 5, 1, bias=False), nn.ReLU(), nn.Conv2d(5, 37, 1, bias=False)
    ).double()
    spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False).double()
    with torch.no_grad():
        for layer, weight in zip((channel[0], channel[2], spatial), weights, strict=True):
            layer.weight.copy_(weight)
        pooled = nn.AdaptiveAvgPool2d(1)(y), nn.AdaptiveMaxPool2d(1)(y)
        of_channels = sum(channel(p) for p in pooled).sigmoid()
        of_pixels = spatial(torch.stack((y.mean(1), y.max(1).values), 1)).sigmoid()
    expected = of_channels * y + of_pixels * y
    torch.testing.assert_close(dual_gate(y, *weights, backend="eager"), expected)


@pytest.mark.parametrize("tokens", [False, True])
def test_gradcheck(tokens: bool) -> None:
    """The C++ backward in float64 against finite differences."""
    case = Case((2, 5, 4, 3), 2, tokens)
    torch.autograd.gradcheck(lambda *x: case.run(x, "cpu"), case.inputs(torch.float64))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "mitpose"])
def test_memory_formats(name: str, backend: str) -> None:
    checks.check_memory_formats(_AsMaps(CASES[name]), backend)


class _AsMaps:
    """A case whose map alone has memory formats."""

    def __init__(self, case: Case) -> None:
        self.op, self.case = case.op, case

    def inputs(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        y, *self.weights = self.case.inputs(dtype, device)
        return [y]

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (*inputs, *self.weights), {}

    def run(self, inputs: Sequence[Tensor], backend: str) -> Tensor:
        return dual_gate(*inputs, *self.weights, backend=backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_weights_may_lie_in_any_way(backend: str) -> None:
    case = CASES["odd-tokens"]
    y, *weights = (t.detach() for t in case.inputs(torch.float32, checks.device_for(backend)))
    expected = dual_gate(y, *weights, backend=backend)
    spread = [torch.stack((w, w), -1)[..., 0] for w in weights]
    assert not any(w.is_contiguous() for w in spread)
    assert torch.equal(dual_gate(y, *spread, backend=backend), expected)
    wide = [w.double() for w in weights]
    assert torch.equal(dual_gate(y, *wide, backend=backend), expected)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "odd-tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_share_a_maximum_share_its_gradient(
    name: str, backend: str, dtype: torch.dtype
) -> None:
    """Small integers: every maximum is taken several times."""
    case = CASES[name]
    y, *weights = case.inputs(dtype, checks.device_for(backend))
    with torch.no_grad():
        y.copy_(y.mul(2).round().clamp(-2, 2))
    grad = torch.randn(y.shape).to(y)
    exact_inputs = [x.detach().double().requires_grad_() for x in (y, *weights)]
    got, eager, exact = (
        torch.autograd.grad(case.run(x, b), x, grad.to(x[0]))
        for x, b in (([y, *weights], backend), ([y, *weights], "eager"), (exact_inputs, "eager"))
    )
    for i, triple in enumerate(zip(got, eager, exact, strict=True)):
        assert_parity(*triple, f"gradient of input {i}", dtype)


@pytest.mark.parametrize("backend", KERNELS)
def test_gates_at_their_ends(backend: str) -> None:
    """Far from zero the sigmoids are 0 and 1, without overflow."""
    y, *weights = CASES["odd"].inputs(torch.float32, checks.device_for(backend))
    for factor in (1e4, -1e4):
        scaled = [w * factor for w in weights]
        got, eager = (dual_gate(y, *scaled, backend=b) for b in (backend, "eager"))
        assert got.isfinite().all()
        torch.testing.assert_close(got, eager)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "odd-tokens"])
def test_nan_spreads_over_its_image_alone(name: str, backend: str) -> None:
    y, *weights = CASES[name].inputs(torch.float32, checks.device_for(backend))
    with torch.no_grad():
        y[1, 2, 3, 4] = torch.nan
    out = dual_gate(y, *weights, backend=backend)
    assert out[1].isnan().all() and out[::2].isfinite().all()


@pytest.mark.parametrize("backend", KERNELS)
def test_half_types_are_summed_in_float32(backend: str) -> None:
    """The sum of these numbers overflows float16; with such means the gates are 1."""
    y = torch.full((1, 16, 8, 8), 2000.0, dtype=torch.float16, device=checks.device_for(backend))
    _, *weights = Case((1, 16, 8, 8), 4).inputs(torch.float32, str(y.device))
    out = dual_gate(y, *(w.abs() for w in weights), backend=backend)
    assert torch.equal(out, 2 * y)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "odd-tokens", "mitpose", "mitpose-tokens"])
def test_deterministic_whatever_the_threads(name: str, backend: str) -> None:
    checks.check_deterministic(CASES[name], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_inputs_are_never_written_wherever_they_start(backend: str) -> None:
    """Views that start in the middle of a vector give what others give."""
    checks.check_inputs_kept(CASES["small"], backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "small-tokens", "batch-0"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(name: str, grad: bool, backend: str) -> None:
    inputs = CASES[name].inputs(torch.float32, checks.device_for(backend))
    args = (*(x.detach().requires_grad_(grad) for x in inputs), backend)
    torch.library.opcheck(torch.ops.kernelpose.dual_gate.default, args)


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
    _, *weights = (t.detach() for t in CASES["small"].inputs(torch.float32, device))

    class Module(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return dual_gate(y, *weights, backend=backend)

    shapes = ({0: torch.export.Dim("batch"), 2: torch.export.Dim("height")},)
    y, other = torch.randn(2, 8, 6, 5, device=device), torch.randn(3, 8, 9, 5, device=device)
    program = torch.export.export(Module(), (y,), dynamic_shapes=shapes)
    assert "kernelpose.dual_gate" in program.graph_module.code
    torch.testing.assert_close(program.module()(other), Module()(other))


@pytest.mark.parametrize("backend", KERNELS)
def test_autocast_leaves_it_alone(backend: str) -> None:
    checks.check_autocast_leaves_alone(CASES["small"], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_inference_mode_and_the_way_around_the_dispatcher(backend: str) -> None:
    checks.check_around_dispatcher(CASES["odd-tokens"], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_function_transforms(backend: str) -> None:
    """torch.func sees plain PyTorch, which agrees with the kernel's own backward."""
    x, *weights = (
        t.detach() for t in CASES["small"].inputs(torch.float32, checks.device_for(backend))
    )

    def total(x: Tensor, name: str | None = None) -> Tensor:
        return dual_gate(x[None], *(w.to(x.dtype) for w in weights), backend=name).square().sum()

    transformed, exact = (torch.func.vmap(torch.func.grad(total))(t) for t in (x, x.double()))
    leaf = x.clone().requires_grad_()
    torch.stack([total(image, backend) for image in leaf]).sum().backward()
    assert leaf.grad is not None
    assert_parity(leaf.grad, transformed, exact)


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivative_is_refused_and_eager_has_it(backend: str) -> None:
    x, *rest = CASES["small"].inputs(torch.float32, checks.device_for(backend))
    for name in (backend, "eager"):
        out = dual_gate(x, *rest, backend=name)
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


ZEROS = torch.zeros(2, 8, 3, 4)
REDUCE, EXPAND, SPATIAL = torch.zeros(2, 8, 1, 1), torch.zeros(8, 2, 1, 1), torch.zeros(1, 2, 7, 7)


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        (([1.0], REDUCE, EXPAND, SPATIAL), {}, TypeError, "y is list; expected a tensor"),
        (
            (ZEROS.long(), REDUCE, EXPAND, SPATIAL),
            {},
            TypeError,
            r"y is torch\.int64; expected a f",
        ),
        (
            (ZEROS[0], REDUCE, EXPAND, SPATIAL),
            {},
            ValueError,
            r"y has .* \(8, 3, 4\); .* \(B, C, H",
        ),
        (
            (ZEROS[:, :, :0], REDUCE, EXPAND, SPATIAL),
            {},
            ValueError,
            "expected a channel and a pix",
        ),
        ((ZEROS, None, EXPAND, SPATIAL), {}, TypeError, "reduce_weight is NoneType; expected a te"),
        (
            (ZEROS, REDUCE, EXPAND.int(), SPATIAL),
            {},
            TypeError,
            r"expand_weight is torch\.int32; e",
        ),
        (
            (ZEROS, REDUCE, EXPAND, SPATIAL.to("meta")),
            {},
            ValueError,
            "spatial_weight is on meta; expected cpu, as y",
        ),
        (
            (ZEROS, EXPAND, EXPAND, SPATIAL),
            {},
            ValueError,
            r"reduce_weight has shape \(8, 2, 1, 1\); expected \(R, 8, 1, 1\) for the 8 channels",
        ),
        ((ZEROS, REDUCE[:0], EXPAND, SPATIAL), {}, ValueError, r"\(0, 8, 1, 1\); expected \(R, 8,"),
        (
            (ZEROS, REDUCE, REDUCE, SPATIAL),
            {},
            ValueError,
            r"expand_weight has shape \(2, 8, 1, 1\); expected \(8, 2, 1, 1\), the inverse",
        ),
        (
            (ZEROS, REDUCE, EXPAND, SPATIAL[..., :5]),
            {},
            ValueError,
            r"spatial_weight has shape \(1, 2, 7, 5\); expected \(1, 2, 7, 7\)",
        ),
        ((ZEROS, REDUCE, EXPAND, SPATIAL), {"backend": "metal"}, ValueError, "backend is 'metal'"),
    ],
)
def test_errors_name_the_argument(
    args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        dual_gate(*args, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
