"""multi_granularity: every backend against the reference, and that against PyTorch's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelpose.backend import OPS
from kernelpose.ops import multi_granularity
from tests.ops import checks
from tests.parity import assert_parity

KERNELS = ("cpu", "cuda", "triton")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]  # (B, C, H, W)
    groups: int
    tokens: bool = False  # as tokens lie: channels_last
    op: str = "multi_granularity"

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        wide = dtype if dtype == torch.float64 else torch.float32
        channels = self.shape[1]
        shapes: list[tuple[int, ...]] = [(channels, 1, side, side) for side in (7, 5, 3)]
        shapes += [(channels,)] * 3
        shapes += [(channels, 3 * channels // self.groups, 1, 1), (channels,)]
        x, *parameters = (
            torch.randn(s, generator=generator, dtype=torch.float64) for s in (self.shape, *shapes)
        )
        x = x.to(device, dtype)
        x = x.contiguous(memory_format=torch.channels_last) if self.tokens else x
        scaled = (p / p[0].numel() ** 0.5 for p in parameters)
        return [t.requires_grad_() for t in (x, *(p.to(device, wide) for p in scaled))]

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, *parameters = inputs
        weights, biases, mix = parameters[:3], parameters[3:6], parameters[6:]
        return (x, weights, biases, *mix), {"groups": self.groups}

    def run(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        args, options = self.arguments(inputs)
        return multi_granularity(*args, **options, backend=backend)


CASES = {
    "small": Case((2, 8, 3, 4), 2),
    "small-tokens": Case((2, 8, 3, 4), 2, tokens=True),
    "mitpose": Case((2, 192, 16, 12), 4),
    "mitpose-tokens": Case((2, 192, 16, 12), 4, tokens=True),
    "odd": Case((3, 35, 5, 7), 5),
    "odd-tokens": Case((3, 35, 5, 7), 5, tokens=True),
    "one-group": Case((1, 19, 9, 8), 1),
    "one-group-tokens": Case((1, 70, 9, 8), 1, tokens=True),
    "wide-group-tokens": Case((1, 140, 2, 3), 1, tokens=True),
    "a-channel-a-group": Case((2, 5, 4, 13), 5, tokens=True),
    "large-map": Case((1, 36, 33, 26), 2),
    "large-map-tokens": Case((1, 36, 33, 26), 2, tokens=True),
    "one-pixel": Case((2, 16, 1, 1), 4),
    "batch-0": Case((0, 8, 3, 4), 2),
}


@pytest.mark.parametrize(("case", "backend", "dtype"), checks.parity_matrix(CASES))
def test_parity(case: Case, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    checks.check_parity(case, backend, dtype)


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_reference_is_the_layers_of_torch(groups: int) -> None:
    """Depthwise convolutions, a mix of reordered channels, and the input."""
    channels, part = 10, 10 // groups
    x = torch.randn(2, channels, 5, 6, dtype=torch.float64)
    layers = [
        nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels).double()
        for k in (7, 5, 3)
    ]
    mix = nn.Conv2d(3 * channels, channels, 1, groups=groups).double()
    parts = [
        layer(x)[:, j * part : (j + 1) * part] for j in range(groups) for layer in layers
    ]  # fmt: skip
    expected = mix(torch.cat(parts, 1)) + x
    weights, biases = ([getattr(layer, n) for layer in layers] for n in ("weight", "bias"))
    got = multi_granularity(
        x, weights, biases, mix.weight, mix.bias, groups=groups, backend="eager"
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("tokens", [False, True])
def test_gradcheck(tokens: bool) -> None:
    """The C++ backward in float64 against finite differences."""
    case = Case((2, 4, 4, 3), 2, tokens)
    torch.autograd.gradcheck(lambda *x: case.run(x, "cpu"), case.inputs(torch.float64))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", [Case((8, 48, 16, 12), 1), Case((1, 16, 64, 48), 1, tokens=True)])
def test_long_sums_keep_their_precision(case: Case, backend: str) -> None:
    """Gradients of parameters add thousands of pixels; one after the other loses 40 ULP here."""
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    torch.manual_seed(1)
    grad = torch.randn(case.shape)
    got = checks.gradients(case.run(inputs, backend), inputs, grad)
    exact = checks.gradients(case.run(exact_inputs, "eager"), exact_inputs, grad)
    ulp = torch.finfo(torch.float32).eps
    for ours, exactly in zip(got[1:], exact[1:], strict=True):
        assert (ours - exactly).abs().max() <= 20 * ulp * exactly.square().mean().sqrt()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "mitpose"])
def test_memory_formats(name: str, backend: str) -> None:
    checks.check_memory_formats(_AsMaps(CASES[name]), backend)


class _AsMaps:
    """A case whose map alone has memory formats."""

    def __init__(self, case: Case) -> None:
        self.op, self.case = case.op, case

    def inputs(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        x, *self.parameters = self.case.inputs(dtype, device)
        return [x]

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.case.arguments((*inputs, *self.parameters))

    def run(self, inputs: Sequence[Tensor], backend: str) -> Tensor:
        return self.case.run((*inputs, *self.parameters), backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "odd-tokens"])
def test_nan_reaches_its_group_and_no_further_than_three_pixels(name: str, backend: str) -> None:
    case = CASES[name]
    x, *parameters = case.inputs(torch.float32, checks.device_for(backend))
    with torch.no_grad():
        x[1, 9, 0, 1] = torch.nan
        got, eager = (case.run((x, *parameters), b).isnan() for b in (backend, "eager"))
    assert torch.equal(got, eager)
    assert got[1, 7:14, :4, :5].all() and got.sum() == 7 * 4 * 5


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
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    args = (*(x.detach().requires_grad_(grad) for x in inputs), case.groups, backend)
    torch.library.opcheck(torch.ops.kernelpose.multi_granularity.default, args)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
@pytest.mark.parametrize("name", ["small", "small-tokens"])
def test_compiles_to_one_graph(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    checks.check_compile(lambda *x: case.run(x, backend), *inputs)


@pytest.mark.parametrize("backend", KERNELS)
def test_export(backend: str) -> None:
    """The program holds the op, and takes any batch and height."""
    device, case = checks.device_for(backend), CASES["small"]
    _, *parameters = (t.detach() for t in case.inputs(torch.float32, device))

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return case.run((x, *parameters), backend)

    shapes = ({0: torch.export.Dim("batch"), 2: torch.export.Dim("height")},)
    x, other = torch.randn(2, 8, 6, 5, device=device), torch.randn(3, 8, 9, 5, device=device)
    program = torch.export.export(Module(), (x,), dynamic_shapes=shapes)
    assert "kernelpose.multi_granularity" in program.graph_module.code
    torch.testing.assert_close(program.module()(other), Module()(other))


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_autocast_casts_it(backend: str) -> None:
    case, device = CASES["small-tokens"], checks.device_for(backend)
    x, *parameters = case.inputs(torch.float32, device)
    expected = case.run((x.bfloat16(), *parameters), backend)
    for tensors in ((x, *parameters), [t.detach() for t in (x, *parameters)]):
        with torch.autocast(device, torch.bfloat16):
            got = case.run(tensors, backend)
        assert got.dtype == torch.bfloat16 and torch.equal(got, expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_inference_mode_and_the_way_around_the_dispatcher(backend: str) -> None:
    checks.check_around_dispatcher(CASES["small-tokens"], backend)


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
        out = case.run((x, *rest), name).square()
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
    ("shape", "groups", "text"),
    [
        ((1, 2**15, 1, 1), 1, f"{2**31} weights of a group's mix, and this has {3 * 2**30}"),
        ((2**26, 32, 1, 1), 16, f"{2**31} programs, and this has {2**26 * 51}"),
        ((1, 32, 2**13, 2**13), 16, f"{2**31} elements of an image, and this has {2**31}"),
    ],
)
def test_triton_objects_to_what_its_numbers_cannot_hold(
    shape: tuple[int, ...], groups: int, text: str
) -> None:
    objection = OPS["multi_granularity"].objection
    x = torch.empty(shape, device="meta")
    assert text in (objection("triton", x, groups=groups) or "")
    assert objection("cpu", x, groups=groups) is None


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((1, 2 * 97, 1, 1), "groups of at most 96 channels, and these have 97"),
        ((1, 4, 2**15, 2**14), f"{2**31} elements of an image, and this has {2**31}"),
        ((2**29, 4, 1, 1), f"{2**31} channels of all images, and this has {2**31}"),
    ],
)
def test_cuda_objects_to_what_it_has_no_room_for(shape: tuple[int, ...], text: str) -> None:
    objection = OPS["multi_granularity"].objection
    batch, channels, height, width = shape
    assert text in (objection("cuda", torch.empty(shape, device="meta"), groups=2) or "")
    smaller = torch.empty(batch, channels - 2, height, width, device="meta")
    assert objection("cuda", smaller, groups=2) is None


ZEROS = torch.zeros(2, 8, 3, 4)
WEIGHTS = [torch.zeros(8, 1, side, side) for side in (7, 5, 3)]
BIAS, MIX = torch.zeros(8), torch.zeros(8, 12, 1, 1)
GOOD: dict[str, Any] = {
    "x": ZEROS,
    "weights": WEIGHTS,
    "biases": [BIAS] * 3,
    "mix_weight": MIX,
    "mix_bias": BIAS,
    "groups": 2,
}


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"x": [1.0]}, TypeError, "x is list; expected a tensor"),
        ({"x": ZEROS.long()}, TypeError, r"x is torch\.int64; expected a floating"),
        ({"x": ZEROS[0]}, ValueError, r"x has shape \(8, 3, 4\); expected \(B, C, H, W\)"),
        ({"x": ZEROS[..., :0]}, ValueError, r"\(2, 8, 3, 0\); expected a channel and a pixel"),
        ({"groups": 3}, ValueError, "groups is 3; expected a divisor of the 8 channels of x"),
        ({"groups": 0}, ValueError, "groups is 0; expected a divisor"),
        ({"groups": 2.0}, TypeError, r"groups is 2\.0; expected an integer"),
        ({"weights": MIX}, TypeError, "weights is Tensor; expected three tensors"),
        ({"weights": WEIGHTS[:2]}, ValueError, "weights has length 2; expected three tensors"),
        ({"biases": [BIAS] * 4}, ValueError, "biases has length 4; expected three tensors"),
        (
            {"weights": WEIGHTS[::-1]},
            ValueError,
            r"weights\[0\] has shape \(8, 1, 3, 3\); expected \(8, 1, 7, 7\)",
        ),
        ({"biases": [BIAS, None, BIAS]}, TypeError, r"biases\[1\] is NoneType; expected a tensor"),
        ({"biases": [BIAS.int()] * 3}, TypeError, r"biases\[0\] is torch\.int32; expected a float"),
        ({"groups": 4}, ValueError, r"mix_weight has shape \(8, 12, 1, 1\); expected \(8, 6, 1, 1"),
        ({"mix_bias": BIAS[:7]}, ValueError, r"mix_bias has shape \(7,\); expected \(8,\)"),
        ({"mix_bias": BIAS.to("meta")}, ValueError, "mix_bias is on meta; expected cpu, as x"),
        ({"backend": "metal"}, ValueError, "backend is 'metal'"),
    ],
)
def test_errors_name_the_argument(wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        multi_granularity(**GOOD | wrong)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
