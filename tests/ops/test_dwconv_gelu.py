"""dwconv_gelu: every backend against the reference, and that against PyTorch's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelpose.backend import OPS
from kernelpose.ops import dwconv_gelu
from tests.ops import checks
from tests.parity import assert_parity

KERNELS = ("cpu", "cuda", "triton")


@dataclass(frozen=True)
class Case:
    batch: int
    channels: int
    size: tuple[int, int]
    op: str = "dwconv_gelu"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.size[0] * self.size[1], self.channels

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        wide = dtype if dtype == torch.float64 else torch.float32
        x, weight, bias = (
            torch.randn(s, generator=generator, dtype=torch.float64)
            for s in (self.shape, (self.channels, 1, 3, 3), (self.channels,))
        )
        tensors = (x.to(device, dtype), (weight / 2).to(device, wide), bias.to(device, wide))
        return [t.requires_grad_() for t in tensors]

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(inputs), {"size": self.size}

    def run(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        args, options = self.arguments(inputs)
        return dwconv_gelu(*args, **options, backend=backend)


CASES = {
    "small": Case(2, 8, (3, 4)),
    "stage": Case(2, 160, (16, 12)),
    "last-stage": Case(1, 2048, (8, 6)),
    "odd": Case(3, 37, (5, 7)),
    "odd-blocks": Case(2, 300, (9, 23)),
    "large-map": Case(1, 24, (64, 48)),
    "one-row": Case(2, 16, (1, 9)),
    "one-column": Case(2, 16, (9, 1)),
    "one-pixel": Case(2, 3, (1, 1)),
    "two-rows": Case(1, 1, (2, 6)),
    "batch-0": Case(0, 8, (3, 4)),
}


@pytest.mark.parametrize(("case", "backend", "dtype"), checks.parity_matrix(CASES))
def test_parity(case: Case, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    checks.check_parity(case, backend, dtype)


def test_reference_is_the_layers_of_torch() -> None:
    x = torch.randn(2, 10, 5, 6, dtype=torch.float64)
    layer = nn.Conv2d(10, 10, 3, padding=1, groups=10).double()
    tokens = x.flatten(2).transpose(1, 2)
    assert layer.bias is not None
    got = dwconv_gelu(tokens, layer.weight, layer.bias, size=(5, 6), backend="eager")
    torch.testing.assert_close(got, nn.GELU()(layer(x)).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("size", [(4, 3), (3, 7), (1, 2)])
def test_gradcheck(size: tuple[int, int]) -> None:
    """The C++ backward in float64 against finite differences."""
    case = Case(2, 3, size)
    torch.autograd.gradcheck(lambda *x: case.run(x, "cpu"), case.inputs(torch.float64))


def through_gelu(z: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """GELU(z) and its derivative: the op on pixels alone, with a kernel that is 1 in the middle."""
    channels = 32
    weight = torch.zeros(channels, 1, 3, 3, device=z.device, dtype=z.dtype)
    weight[:, :, 1, 1] = 1
    x = z.reshape(-1, 1, channels).requires_grad_()
    out = dwconv_gelu(x, weight, torch.zeros_like(weight[:, 0, 0, 0]), size=(1, 1), backend=backend)
    (derivative,) = torch.autograd.grad(out.sum(), x)
    return out.detach().flatten(), derivative.flatten()


@pytest.mark.parametrize("backend", KERNELS)
def test_gelu_keeps_the_digits_of_its_tail(backend: str) -> None:
    """1 + erf(z), which eager takes, has none of them left at z = -5."""
    z = torch.cat([torch.linspace(-13, 7, 64_000), torch.linspace(-1, 1, 32_000)])
    z = z.to(checks.device_for(backend))
    exact = z.double() * torch.special.erfc(z.double() * -(0.5**0.5)) / 2
    density = torch.exp(z.double().square() / -2) / (2 * torch.pi) ** 0.5
    exact_derivative = torch.special.erfc(z.double() * -(0.5**0.5)) / 2 + z * density
    got, derivative = through_gelu(z, backend)
    magnitude = exact.float().abs()
    ulp = torch.nextafter(magnitude, torch.full_like(magnitude, torch.inf)) - magnitude
    error = (got - exact).abs() / ulp
    for first, limit, mean in ((-1, 4, 1), (-3, 12, 2.5), (-6, 150, 10)):
        assert error[z > first].max() <= limit and error[z > first].mean() <= mean
    assert (got - exact).abs()[z < -6].max() < 1e-13
    assert (derivative - exact_derivative).abs().max() < 1.5e-7


@pytest.mark.parametrize(
    ("backend", "dtype"), [*((name, torch.float32) for name in KERNELS), ("cpu", torch.float64)]
)
def test_gelu_far_out(backend: str, dtype: torch.dtype) -> None:
    z = torch.tensor([torch.nan, torch.inf, 3e38, 50, -50, -3e38, 0, -0.0], dtype=dtype)
    got, derivative = through_gelu(z.to(checks.device_for(backend)).repeat(4), backend)
    expected = torch.tensor([torch.nan, torch.inf, 3e38, 50, 0, 0, 0, 0], dtype=dtype)
    torch.testing.assert_close(got[:8].cpu(), expected, equal_nan=True, rtol=0, atol=2e-13)
    expected = torch.tensor([torch.nan, 1, 1, 1, 0, 0, 0.5, 0.5], dtype=dtype)
    derivative[1] = 1  # at infinity, where float64 has none
    torch.testing.assert_close(derivative[:8].cpu(), expected, equal_nan=True, rtol=0, atol=2e-13)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "stage"])
def test_tokens_that_are_not_dense(name: str, backend: str) -> None:
    """Tokens after one that is no part of the map, of a map, and a gradient of one number."""
    case = CASES[name]
    x, *parameters = case.inputs(torch.float32, checks.device_for(backend))
    wide = torch.nn.functional.pad(x.detach(), (0, 0, 1, 0))[:, 1:]
    of_map = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    expected = case.run((x, *parameters), backend)
    grad = torch.full((), 0.5, device=expected.device).expand_as(expected)
    of_expected = checks.gradients(expected, (x, *parameters), grad.contiguous())
    for view in (wide, of_map):
        assert not view.is_contiguous()
        leaves = [view.requires_grad_(), *parameters]
        got = case.run(leaves, backend)
        assert torch.equal(got, expected) and got.is_contiguous()
        of_got = torch.autograd.grad(got, leaves, grad)
        assert all(torch.equal(*pair) for pair in zip(of_got, of_expected, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_nan_reaches_its_neighbours_alone(backend: str) -> None:
    case = CASES["odd"]
    x, *parameters = case.inputs(torch.float32, checks.device_for(backend))
    with torch.no_grad():
        x[1, 2 * 7 + 6, 9] = torch.nan  # at the right border
        got, eager = (case.run((x, *parameters), b).isnan() for b in (backend, "eager"))
    assert torch.equal(got, eager)
    assert got.unflatten(1, case.size)[1, 1:4, 5:, 9].all() and got.sum() == 6


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "odd-blocks", "large-map"])
def test_deterministic_whatever_the_threads(name: str, backend: str) -> None:
    checks.check_deterministic(CASES[name], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_inputs_are_never_written_wherever_they_start(backend: str) -> None:
    """Views that start in the middle of a vector give what others give."""
    checks.check_inputs_kept(CASES["small"], backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "batch-0"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(name: str, grad: bool, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    args = (*(x.detach().requires_grad_(grad) for x in inputs), *case.size, backend)
    torch.library.opcheck(torch.ops.kernelpose.dwconv_gelu.default, args)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_compiles_to_one_graph(backend: str) -> None:
    case = CASES["small"]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    checks.check_compile(lambda *x: case.run(x, backend), *inputs)


class _Layer(nn.Module):
    def __init__(self, backend: str, device: str) -> None:
        super().__init__()
        self.backend = backend
        self.convolution = nn.Conv2d(8, 8, 3, padding=1, groups=8, device=device)

    def forward(self, maps: Tensor) -> Tensor:
        """maps (B, H, W, C)"""
        layer, size = self.convolution, (maps.shape[1], maps.shape[2])
        assert layer.bias is not None
        tokens = maps.flatten(1, 2)
        return dwconv_gelu(tokens, layer.weight, layer.bias, size=size, backend=self.backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_export(backend: str) -> None:
    """The program holds the op, and takes any batch and height."""
    device = checks.device_for(backend)
    layer = _Layer(backend, device)
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("height")},)
    maps, others = torch.randn(2, 6, 5, 8, device=device), torch.randn(3, 9, 5, 8, device=device)
    program = torch.export.export(layer, (maps,), dynamic_shapes=shapes)
    assert "kernelpose.dwconv_gelu" in program.graph_module.code
    torch.testing.assert_close(program.module()(others), layer(others))


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_autocast_casts_it(backend: str) -> None:
    case, device = CASES["small"], checks.device_for(backend)
    x, *parameters = case.inputs(torch.float32, device)
    expected = case.run((x.bfloat16(), *parameters), backend)
    for tensors in ((x, *parameters), [t.detach() for t in (x, *parameters)]):
        with torch.autocast(device, torch.bfloat16):
            got = case.run(tensors, backend)
        assert got.dtype == torch.bfloat16 and torch.equal(got, expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_inference_mode_and_the_way_around_the_dispatcher(backend: str) -> None:
    checks.check_around_dispatcher(CASES["odd"], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_function_transforms(backend: str) -> None:
    """torch.func sees plain PyTorch, which agrees with the kernel's own backward."""
    case = CASES["small"]
    x, *parameters = (t.detach() for t in case.inputs(torch.float32, checks.device_for(backend)))

    def total(x: Tensor, name: str | None = None) -> Tensor:
        return case.run((x[None], *(p.to(x.dtype) for p in parameters)), name).square().sum()

    transformed, exact = (torch.func.vmap(torch.func.grad(total))(t) for t in (x, x.double()))
    leaf = x.clone().requires_grad_()
    torch.stack([total(image, backend) for image in leaf]).sum().backward()
    assert leaf.grad is not None
    assert_parity(leaf.grad, transformed, exact)


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivative_is_refused_and_eager_has_it(backend: str) -> None:
    case = CASES["small"]
    x, *rest = case.inputs(torch.float32, checks.device_for(backend))
    for name in (backend, "eager"):
        out = case.run((x, *rest), name)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        if name == backend:
            with pytest.raises(RuntimeError, match=f"backend is '{backend}'; expected 'eager' for"):
                torch.autograd.grad(first.square().sum(), x)
        else:
            assert torch.autograd.grad(first.square().sum(), x)[0].abs().max() > 0


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", ["stage", "odd"])
def test_side_stream_and_graph_capture(name: str, backend: str) -> None:
    checks.check_side_stream(CASES[name], backend)
    checks.check_graph_capture(CASES[name], backend)


@pytest.mark.parametrize(
    ("backend", "shape", "what"),
    [
        ("cuda", (2**16, 2**14, 33), "tokens of 32 channels"),
        ("triton", (2**16, 2**14, 33), "tokens of 32 channels"),
        ("triton", (1, 2**21, 2**10), "elements of an image"),
    ],
)
def test_no_room_is_an_objection(backend: str, shape: tuple[int, int, int], what: str) -> None:
    x = torch.empty(shape, device="meta")
    reason = OPS["dwconv_gelu"].objection(backend, x)
    assert reason == f"it takes fewer than {2**31} {what}, and this has {2**31}"
    assert OPS["dwconv_gelu"].objection(backend, x[:, 1:]) is None


GOOD: dict[str, Any] = {
    "x": torch.zeros(2, 12, 8),
    "weight": torch.zeros(8, 1, 3, 3),
    "bias": torch.zeros(8),
    "size": (3, 4),
}


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"x": [1.0]}, TypeError, "x is list; expected a tensor"),
        ({"x": GOOD["x"].long()}, TypeError, r"x is torch\.int64; expected a floating"),
        ({"x": GOOD["x"][0]}, ValueError, r"x has shape \(12, 8\); expected \(B, N, C\)"),
        ({"x": GOOD["x"][..., :0]}, ValueError, r"x has shape \(2, 12, 0\); expected \(B, N, C\)"),
        ({"size": 3}, TypeError, r"size is 3; expected \(height, width\), two positive integers"),
        ({"size": (3, 4, 1)}, TypeError, r"size is \(3, 4, 1\); expected \(height, width\)"),
        ({"size": (3.0, 4)}, TypeError, r"size is \(3\.0, 4\); expected \(height, width\)"),
        ({"size": (-3, -4)}, TypeError, r"size is \(-3, -4\); expected \(height, width\)"),
        ({"size": (4, 4)}, ValueError, r"size is \(4, 4\); expected the 12 tokens of x"),
        ({"weight": None}, TypeError, "weight is NoneType; expected a tensor"),
        (
            {"weight": GOOD["weight"][:, 0]},
            ValueError,
            r"weight has shape \(8, 3, 3\); expected \(8, 1, 3, 3\)",
        ),
        ({"bias": GOOD["bias"].int()}, TypeError, r"bias is torch\.int32; expected a float"),
        ({"bias": GOOD["bias"][:7]}, ValueError, r"bias has shape \(7,\); expected \(8,\)"),
        ({"bias": GOOD["bias"].to("meta")}, ValueError, "bias is on meta; expected cpu, as x"),
        ({"backend": "metal"}, ValueError, "backend is 'metal'"),
    ],
)
def test_errors_name_the_argument(wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        dwconv_gelu(**GOOD | wrong)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
