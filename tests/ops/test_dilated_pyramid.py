"""dilated_pyramid: every backend against the reference, and that against PyTorch's layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpose.backend import OPS, choose
from kernelpose.ops import dilated_pyramid
from tests.ops import checks
from tests.parity import assert_parity

KERNELS = ("cpu", "cuda", "triton")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]  # (B, C, H, W)
    widths: tuple[int, ...]
    dilations: tuple[int, ...]
    stride: int = 1
    mode: str = "concat"
    activation: str = "relu"
    tokens: bool = False  # as tokens lie: channels_last
    op: str = "dilated_pyramid"

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        wide = dtype if dtype == torch.float64 else torch.float32
        x, *parameters = (t.clone() for t in _drawn(self, dtype))
        x = x.to(device)
        x = x.contiguous(memory_format=torch.channels_last) if self.tokens else x
        return [t.requires_grad_() for t in (x, *(p.to(device, wide) for p in parameters))]

    @property
    def options(self) -> dict[str, Any]:
        names = ("dilations", "stride", "mode", "activation")
        return {name: getattr(self, name) for name in names}

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, *parameters = inputs
        count = len(self.widths)
        return (x, parameters[:count], parameters[count:]), self.options

    def run(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        args, options = self.arguments(inputs)
        return dilated_pyramid(*args, **options, backend=backend)


@functools.cache
def _drawn(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """x in `dtype`, then weights and biases: biases that leave the widest gap around ReLU's jump,
    where rounding would decide what the gradient is."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.shape, generator=generator, dtype=torch.float64).to(dtype)
    maps, weights, biases, stride = x.double(), [], [], case.stride
    for width, dilation in zip(case.widths, case.dilations, strict=True):
        shape = (width, maps.shape[1], 3, 3)
        weight = torch.randn(shape, generator=generator) * (2 / (9 * shape[1])) ** 0.5
        maps = F.conv2d(maps, weight.double(), None, stride, dilation, dilation)
        bias, stride = torch.zeros(width), 1
        for channel in range(width if case.shape[0] else 0):
            values = maps[:, channel].flatten().sort().values
            values = torch.cat((values[:1] - 1, values, values[-1:] + 1))
            values = values[len(values) // 4 : len(values) * 3 // 4 + 1]
            widest = values.diff().argmax()
            bias[channel] = -values[widest : widest + 2].mean()
        maps = (maps + bias.double().view(-1, 1, 1)).relu()
        weights.append(weight)
        biases.append(bias)
    return [x, *weights, *biases]


CASES = {
    "stem": Case((2, 3, 13, 9), (16,) * 4, (1, 2, 5, 1), stride=2),
    "stem-tokens": Case((2, 3, 13, 9), (16,) * 4, (1, 2, 5, 1), stride=2, tokens=True),
    "sum": Case((2, 32, 8, 6), (32,) * 3, (1, 2, 5), mode="sum"),
    "sum-tokens": Case((2, 32, 8, 6), (32,) * 3, (1, 2, 5), mode="sum", tokens=True),
    "odd": Case((3, 5, 5, 7), (7, 19, 3), (2, 1, 7)),
    "odd-tokens": Case((3, 5, 5, 7), (7, 19, 3), (2, 1, 7), tokens=True),
    "wide": Case((1, 70, 7, 9), (50, 33), (1, 3), stride=2, activation="none"),
    "wide-tokens": Case((1, 70, 7, 9), (50, 33), (1, 3), stride=2, activation="none", tokens=True),
    "sum-of-any": Case((1, 2, 6, 27), (4, 4), (3, 2), stride=3, mode="sum", activation="none"),
    # Wide enough for Winograd's way, and with outputs and tiles that are no multiple.
    "winograd": Case((2, 33, 9, 7), (40, 35), (1, 2), activation="none"),
    "winograd-tokens": Case((1, 36, 21, 13), (33, 34), (2, 5), activation="none", tokens=True),
    "one-convolution": Case((2, 4, 3, 29), (8,), (2,), mode="sum"),
    "one-pixel": Case((2, 8, 1, 1), (8, 8), (1, 2)),
    "large": Case((1, 3, 60, 52), (16,) * 3, (1, 2, 5), stride=2, activation="none"),
    "large-tokens": Case((1, 16, 30, 53), (32, 32), (2, 5), activation="none", tokens=True),
    "batch-0": Case((0, 8, 3, 4), (8, 8), (1, 2)),
    "batch-0-sum": Case((0, 8, 3, 4), (8, 8), (1, 2), mode="sum"),
}


@pytest.mark.parametrize(("case", "backend", "dtype"), checks.parity_matrix(CASES))
def test_parity(case: Case, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    checks.check_parity(case, backend, dtype)


def test_gradients_of_a_large_map_keep_their_digits() -> None:
    """A weight's gradient is a sum over 12288 pixels."""
    case = Case((1, 32, 128, 96), (32,) * 3, (1, 2, 5), mode="sum", tokens=True)
    checks.check_parity(case, "cpu", torch.float32)


@pytest.mark.parametrize("mode", ["concat", "sum"])
def test_reference_is_the_layers_of_torch(mode: str) -> None:
    dilations = (1, 2, 5)
    layers = [nn.Conv2d(6, 6, 3, 1, d, d).double() for d in dilations]
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    maps = [nn.Sequential(*(nn.Sequential(layer, nn.ReLU()) for layer in layers[: i + 1]))(x)
            for i in range(3)]  # fmt: skip
    expected = torch.cat(maps, 1) if mode == "concat" else torch.stack(maps).sum(0)
    weights, biases = ([getattr(layer, n) for layer in layers] for n in ("weight", "bias"))
    got = dilated_pyramid(x, weights, biases, dilations=dilations, mode=mode, backend="eager")
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mode", ["concat", "sum"])
@pytest.mark.parametrize("tokens", [False, True])
def test_gradcheck(tokens: bool, mode: str) -> None:
    """The backward in float64 against finite differences."""
    case = Case((2, 2, 4, 3), (3, 3), (1, 2), 2, mode, tokens=tokens)
    torch.autograd.gradcheck(lambda *x: case.run(x, "cpu"), case.inputs(torch.float64))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("mode", ["concat", "sum"])
def test_only_the_gradients_that_are_wanted(mode: str, backend: str) -> None:
    """An image needs no gradient; neither do frozen parameters."""
    case = Case((2, 3, 6, 5), (4, 4), (1, 2), 1, mode)
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    both = [case.run(inputs, name).sum() for name in (backend, "eager")]
    expected = torch.autograd.grad(both[1], inputs)
    for wanted in ([0], [2], [4], [1, 2, 3, 4]):
        given = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        got = torch.autograd.grad(case.run(given, backend).sum(), [given[i] for i in wanted])
        torch.testing.assert_close(got, tuple(expected[i] for i in wanted))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "stem", "sum"])
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
@pytest.mark.parametrize("name", ["odd", "odd-tokens", "stem", "sum"])
def test_nan_goes_as_far_as_eagers(name: str, backend: str) -> None:
    case = CASES[name]
    x, *parameters = case.inputs(torch.float32, checks.device_for(backend))
    with torch.no_grad():
        x[1, 1, 0, 1] = torch.nan
        got, eager = (case.run((x, *parameters), b).isnan() for b in (backend, "eager"))
    if backend == "cpu" and min(case.shape[1], *case.widths) >= 32:
        assert got[eager].all() and not got[0].any()  # Winograd's tiles share it
    else:
        assert torch.equal(got, eager) and 0 < got.sum() < got.numel()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "odd-tokens", "stem", "sum-tokens"])
def test_deterministic_whatever_the_threads(name: str, backend: str) -> None:
    checks.check_deterministic(CASES[name], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_inputs_are_never_written_wherever_they_start(backend: str) -> None:
    """Views that start in the middle of a vector give what others give."""
    checks.check_inputs_kept(CASES["stem"], backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    "name",
    ["one-convolution", "batch-0", *(pytest.param(n, marks=pytest.mark.full) for n in CASES)],
)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(name: str, grad: bool, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    (x, *lists), options = case.arguments([x.detach().requires_grad_(grad) for x in inputs])
    keep = case.mode == "sum" and grad
    args = (x, *lists, list(case.dilations), *list(options.values())[1:], keep, backend)
    torch.library.opcheck(torch.ops.kernelpose.dilated_pyramid.default, args)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
@pytest.mark.parametrize("name", ["stem", "sum-tokens"])
def test_compiles_to_one_graph(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    checks.check_compile(lambda *x: case.run(x, backend), *inputs)


@pytest.mark.parametrize("backend", KERNELS)
def test_export(backend: str) -> None:
    """The program holds the op, and takes any batch and height."""
    device, case = checks.device_for(backend), CASES["stem"]
    _, *parameters = (t.detach() for t in case.inputs(torch.float32, device))

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return case.run((x, *parameters), backend)

    # With a height of 1 the result lies in either format.
    shapes = ({0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=3)},)
    x, other = torch.randn(2, 3, 6, 5, device=device), torch.randn(3, 3, 9, 5, device=device)
    program = torch.export.export(Module(), (x,), dynamic_shapes=shapes)
    assert "kernelpose.dilated_pyramid" in program.graph_module.code
    torch.testing.assert_close(program.module()(other), Module()(other))


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_autocast_casts_it(backend: str) -> None:
    case, device = CASES["sum-tokens"], checks.device_for(backend)
    x, *parameters = case.inputs(torch.float32, device)
    expected = case.run((x.bfloat16(), *parameters), backend)
    for tensors in ((x, *parameters), [t.detach() for t in (x, *parameters)]):
        with torch.autocast(device, torch.bfloat16):
            got = case.run(tensors, backend)
        assert got.dtype == torch.bfloat16 and torch.equal(got, expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_inference_mode_and_the_way_around_the_dispatcher(backend: str) -> None:
    checks.check_around_dispatcher(CASES["odd-tokens"], backend)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", ["stem", "sum-tokens"])
def test_side_stream_and_graph_capture(name: str, backend: str) -> None:
    checks.check_side_stream(CASES[name], backend)
    checks.check_graph_capture(CASES[name], backend)


@pytest.mark.parametrize(("channels", "expected"), [(3, "cpu"), (160, "cpu"), (256, "eager")])
def test_automatic_choice_is_the_faster_one(channels: int, expected: str) -> None:
    case = Case((1, channels, 2, 2), (16,), (1,))
    args, options = case.arguments(case.inputs(torch.float32))
    assert choose("dilated_pyramid", None, *args, **options) == expected


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_large_maps_are_refused(backend: str) -> None:
    x, weight = torch.empty(1, 2, 2**15, 2**15, device="meta"), torch.empty(1, 2, 3, 3)
    objection = OPS["dilated_pyramid"].objection
    text = objection(backend, x, [weight], [], dilations=(1,))
    assert text == f"it takes fewer than {2**31} elements of an image's maps, and this has {2**31}"
    x = torch.empty(2**31, 1, 1, 1, device="meta")
    text = objection(backend, x, [weight], [], dilations=(1,))
    assert text == f"it takes fewer than {2**31} tiles of all images, and this has {2**31}"
    assert objection("cpu", x, [weight], [], dilations=(1,)) is None


@pytest.mark.parametrize("backend", KERNELS)
def test_function_transforms(backend: str) -> None:
    """torch.func sees plain PyTorch, which agrees with the kernel's own backward."""
    case = CASES["stem"]
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
    case = CASES["stem"]
    x, *rest = case.inputs(torch.float32, checks.device_for(backend))
    for name in (backend, "eager"):
        out = case.run((x, *rest), name).square()
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        if name == backend:
            with pytest.raises(RuntimeError, match=f"backend is '{backend}'; expected 'eager' for"):
                torch.autograd.grad(first.square().sum(), x)
        else:
            assert torch.autograd.grad(first.square().sum(), x)[0].abs().max() > 0


ZEROS = torch.zeros(2, 8, 3, 4)
WEIGHTS = [torch.zeros(4, 8, 3, 3), torch.zeros(6, 4, 3, 3)]
BIASES = [torch.zeros(4), torch.zeros(6)]
GOOD: dict[str, Any] = {"x": ZEROS, "weights": WEIGHTS, "biases": BIASES, "dilations": (1, 2)}


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"x": [1.0]}, TypeError, "x is list; expected a tensor"),
        ({"x": ZEROS.long()}, TypeError, r"x is torch\.int64; expected a floating"),
        ({"x": ZEROS[0]}, ValueError, r"x has shape \(8, 3, 4\); expected \(B, C, H, W\)"),
        ({"x": ZEROS[..., :0]}, ValueError, r"\(2, 8, 3, 0\); expected a channel and a pixel"),
        ({"weights": ZEROS}, TypeError, "weights is Tensor; expected a list"),
        ({"weights": []}, ValueError, "weights is empty; expected a convolution at least"),
        ({"biases": BIASES[:1]}, ValueError, "biases has length 1; expected 2, as weights"),
        ({"dilations": 2}, TypeError, "dilations is int; expected a list"),
        ({"dilations": (1, 2, 5)}, ValueError, "dilations has length 3; expected 2, as weights"),
        ({"dilations": (1, 0)}, ValueError, r"dilations\[1\] is 0; expected 1 or more"),
        ({"dilations": (1.0, 2)}, TypeError, r"dilations\[0\] is 1\.0; expected an integer"),
        ({"stride": 0}, ValueError, "stride is 0; expected 1 or more"),
        ({"stride": "2"}, TypeError, "stride is '2'; expected an integer"),
        ({"mode": "add"}, ValueError, "mode is 'add'; expected 'concat' or 'sum'"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'; expected 'relu' or 'none'"),
        (
            {"weights": WEIGHTS[::-1]},
            ValueError,
            r"weights\[0\] has shape \(6, 4, 3, 3\); expected \(C, 8, 3, 3\)",
        ),
        (
            {"weights": [WEIGHTS[0], None]},
            TypeError,
            r"weights\[1\] is NoneType; expected a tensor",
        ),
        ({"weights": [WEIGHTS[0][:0]] * 2}, ValueError, r"weights\[0\] has shape \(0, 8, 3, 3\)"),
        ({"biases": [BIASES[0].int()] * 2}, TypeError, r"biases\[0\] is torch\.int32; expected"),
        ({"biases": BIASES[::-1]}, ValueError, r"biases\[0\] has shape \(6,\); expected \(4,\)"),
        (
            {"biases": [BIASES[0].to("meta")] * 2},
            ValueError,
            r"\[0\] is on meta; expected cpu, as x",
        ),
        ({"mode": "sum"}, ValueError, r"weights\[1\] has 6 outputs; expected 4, as weights\[0\]"),
        ({"backend": "metal"}, ValueError, "backend is 'metal'"),
    ],
)
def test_errors_name_the_argument(wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        dilated_pyramid(**GOOD | wrong)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
