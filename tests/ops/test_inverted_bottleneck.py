"""inverted_bottleneck: the kernel against the reference, and the reference against layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernelpose
from kernelpose.backend import OPS, why_not
from kernelpose.ops import inverted_bottleneck
from tests.ops import checks

KERNELS = [name for name in OPS["inverted_bottleneck"].dtypes if name != "eager"]


@dataclass(frozen=True)
class Case:
    batch: int
    channels: tuple[int, int, int]  # C, hidden, outputs
    size: tuple[int, int]
    stride: int = 1
    residual: bool = False
    activations: tuple[str, str] = ("none", "silu")
    depthwise: bool = True
    op: str = "inverted_bottleneck"

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        inputs, hidden, outputs = self.channels
        generator = torch.Generator().manual_seed(0)
        shapes: list[tuple[int, ...]] = [(hidden, inputs, 1, 1), (hidden,)]
        shapes += [(hidden, 1, 3, 3), (hidden,)] * self.depthwise
        shapes += [(outputs, hidden, 1, 1), (outputs,)]
        x = torch.randn(self.batch, inputs, *self.size, generator=generator)
        weights = [torch.randn(s, generator=generator) for s in shapes]
        scaled = [w / max(1, w[0].numel()) ** 0.5 for w in weights]
        return [t.to(device, dtype) for t in (x, *scaled)]

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tensors = list(inputs) if self.depthwise else [*inputs[:3], None, None, *inputs[3:]]
        options = {
            "stride": self.stride,
            "residual": self.residual,
            "activations": self.activations,
        }
        return tuple(tensors), options

    def run(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        args, options = self.arguments(inputs)
        return inverted_bottleneck(*args, **options, backend=backend)


CASES = {
    "small": Case(2, (8, 16, 8), (6, 4), residual=True),
    "odd": Case(2, (5, 37, 5), (7, 9), residual=True, activations=("silu", "relu")),
    "odd-stride": Case(3, (24, 48, 20), (13, 7), 2),
    "even-stride": Case(2, (16, 64, 40), (8, 12), 2, activations=("relu", "none")),
    "stage": Case(1, (64, 256, 64), (16, 12), residual=True),
    "wide": Case(1, (96, 384, 130), (6, 8), 2),
    "one-pixel": Case(2, (3, 8, 4), (1, 1)),
    "one-pixel-stride": Case(2, (3, 8, 4), (1, 1), 2),
    "one-row": Case(1, (4, 20, 6), (1, 11)),
    "one-column": Case(1, (4, 20, 6), (11, 1), 2),
    "pointwise": Case(
        3, (20, 40, 20), (5, 7), residual=True, activations=("silu", "none"), depthwise=False
    ),
    "pointwise-odd": Case(1, (7, 33, 18), (9, 11), activations=("relu", "none"), depthwise=False),
    "no-second-activation": Case(2, (16, 24, 8), (3, 5), depthwise=False),
    "several-blocks": Case(1, (200, 40, 200), (5, 9), residual=True, activations=("relu", "silu")),
    "batch-0": Case(0, (8, 16, 8), (6, 4)),
}


@pytest.mark.parametrize(("case", "backend", "dtype"), checks.parity_matrix(CASES))
def test_parity(case: Case, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    checks.check_forward_parity(case, backend, dtype)


@pytest.mark.parametrize("stride", [1, 2])
def test_reference_is_the_layers_of_torch(stride: int) -> None:
    layers = nn.Sequential(
        nn.Conv2d(6, 12, 1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, stride=stride, padding=1, groups=12),
        nn.SiLU(),
        nn.Conv2d(12, 6, 1),
    ).double()
    x = torch.randn(2, 6, 5, 8, dtype=torch.float64)
    weights = [p for layer in layers for p in layer.parameters()]
    for residual in (False, True)[: 3 - stride]:
        got = inverted_bottleneck(
            x, *weights, stride=stride, residual=residual, activations=("relu", "silu")
        )
        torch.testing.assert_close(got, layers(x) + x if residual else layers(x))
        assert torch.autograd.grad(got.sum(), weights[0])[0].abs().sum() > 0


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "odd-stride", "stage", "pointwise"])
def test_memory_formats_and_views(name: str, backend: str) -> None:
    """Whatever x lies in, the same bits, in channels_last memory."""
    case = CASES[name]
    x, *weights = case.inputs(torch.float32, checks.device_for(backend))
    expected = case.run((x, *weights), backend)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    moved = torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x)
    lasts = torch.cat((x.flatten()[:1], x.permute(0, 2, 3, 1).flatten()))[1:]
    last = lasts.view_as(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    wide = torch.nn.functional.pad(x, (1, 0))[..., 1:]
    for view in (x.contiguous(memory_format=torch.channels_last), moved, last, wide):
        kept = view.clone()
        assert torch.equal(case.run((view, *weights), backend), expected)
        assert torch.equal(view, kept)
    strided = [w.transpose(0, -1).contiguous().transpose(0, -1) for w in weights]
    shifted = [torch.cat((w.flatten()[:1], w.flatten()))[1:].view_as(w) for w in weights]
    for others in (strided, shifted):
        assert torch.equal(case.run((x, *others), backend), expected)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "odd-stride", "stage", "pointwise", "pointwise-odd"])
def test_deterministic_whatever_the_threads(name: str, backend: str) -> None:
    case, before = CASES[name], torch.get_num_threads()
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    results = []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            results.append(case.run(inputs, backend))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("backend", KERNELS)
def test_nan_reaches_its_neighbours_alone(backend: str) -> None:
    case = CASES["odd"]
    x, *weights = case.inputs(torch.float32, checks.device_for(backend))
    x[1, 2, 0, 8] = torch.nan
    got, eager = (case.run((x, *weights), name).isnan() for name in (backend, "eager"))
    assert torch.equal(got, eager) and got.sum() == 4 * 5


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_activations_far_out(activation: str, backend: str) -> None:
    z = torch.tensor([torch.nan, torch.inf, 3e38, 90.0, 88.0, 0.0, -10.0, -88.0, -104.0, -3e38])
    z = z.to(checks.device_for(backend))
    one, zero = z.new_ones(1, 1, 1, 1), z.new_zeros(1)
    args = (z.reshape(1, 1, 2, 5), one, zero, None, None, one, zero)
    got = inverted_bottleneck(*args, activations=(activation, "none"), backend=backend).flatten()
    expected = getattr(torch.nn.functional, activation)(z.double()).float()
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-36, equal_nan=True)


def test_a_gradient_and_other_dtypes_are_eagers() -> None:
    case = CASES["small"]
    inputs = case.inputs(torch.float32)
    args, options = case.arguments(inputs)
    assert why_not("inverted_bottleneck", "cpu", *args) is None
    halves = [t.bfloat16() for t in inputs]
    assert case.run(halves).dtype == torch.bfloat16
    args[1].requires_grad_()
    text = "it has no gradient, and an input requires one"
    assert why_not("inverted_bottleneck", "cpu", *args) == text
    assert inverted_bottleneck(*args, **options).requires_grad
    with torch.no_grad():
        assert why_not("inverted_bottleneck", "cpu", *args) is None


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
@pytest.mark.parametrize("name", ["small", "pointwise"])
def test_autocast(name: str, backend: str) -> None:
    """All tensors are cast, whatever each was; float64 is left alone."""
    case, device = CASES[name], checks.device_for(backend)
    dtype = torch.float16 if device == "cpu" and backend == "triton" else torch.bfloat16
    backend = "eager" if backend == "cpu" else backend  # which takes float32 alone
    inputs = case.inputs(torch.float32, device)
    expected = case.run([x.to(dtype) for x in inputs], backend)
    mixed = [x.to(dtype) if i % 2 else x for i, x in enumerate(inputs)]
    with torch.autocast(device, dtype):
        outputs = [case.run(x, backend) for x in (inputs, mixed)]
        wide = case.run([x.double() for x in inputs], "eager")
        args, _ = case.arguments(inputs)
        if backend != "eager":
            op = torch.ops.kernelpose.inverted_bottleneck
            options = (case.stride, case.residual, *case.activations, backend)
            outputs.append(op(*args, *options))
    assert all(x.dtype == dtype and torch.equal(x, expected) for x in outputs)
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "odd-stride", "pointwise"])
def test_around_the_dispatcher(name: str, backend: str) -> None:
    """What the registered op gives, bit for bit."""
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    tensors, _ = case.arguments(inputs)
    options = (case.stride, case.residual, *case.activations, backend)
    registered = torch.ops.kernelpose.inverted_bottleneck(*tensors, *options)
    direct = case.run(inputs, backend)
    assert torch.equal(direct, registered) and direct.stride() == registered.stride()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "odd-stride", "pointwise", "batch-0"])
def test_opcheck(name: str, backend: str) -> None:
    case = CASES[name]
    tensors, _ = case.arguments(case.inputs(torch.float32, checks.device_for(backend)))
    args = (*tensors, case.stride, case.residual, *case.activations, backend)
    torch.library.opcheck(torch.ops.kernelpose.inverted_bottleneck.default, args)


@pytest.mark.parametrize("backend", KERNELS)
def test_side_stream(backend: str) -> None:
    checks.check_side_stream(CASES["small"], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_graph_capture(backend: str) -> None:
    checks.check_graph_capture(CASES["small"], backend)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(
    ("x", "hidden", "outputs", "text"),
    [
        ((1, 1, 2**15, 2**15), 8, 1, "1073741824 pixels of an image, and this has 1073741824"),
        ((1, 64, 2**13, 2**12), 8, 8, "2147483648 elements of an image, and this has 2147483648"),
        ((1, 8, 2**13, 2**12), 8, 64, "2147483648 elements of an image, and this has 2147483648"),
        ((1, 2**20, 2, 2), 2**11, 8, "2147483648 elements of a weight, and this has 2147483648"),
        ((2**14, 1, 2**8, 2**8), 8, 128, "2147483648 pixels of all images for 128 outputs, and"),
    ],
)
def test_what_is_too_large_is_an_objection(
    x: tuple[int, ...], hidden: int, outputs: int, text: str, backend: str
) -> None:
    shapes = (x, (hidden, x[1], 1, 1), (hidden,), (hidden, 1, 3, 3), (hidden,))
    tensors = [torch.empty(1, device="meta").expand(s) for s in shapes]
    last = [tensors[0].new_empty(1).expand(s) for s in ((outputs, hidden, 1, 1), (outputs,))]
    objection = OPS["inverted_bottleneck"].objection
    assert f"it takes fewer than {text}" in str(objection(backend, *tensors, *last))
    assert objection("cpu", *tensors, *last) is None
    less = tensors[0][:1, :1, :2, :2]
    assert objection(backend, less, tensors[1][:, :1], *tensors[2:], *last) is None


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
@pytest.mark.parametrize("name", ["small", "odd-stride", "pointwise"])
def test_compiles_to_one_graph(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    checks.check_compile(lambda *x: case.run(x, backend), *inputs)


@pytest.mark.parametrize("backend", KERNELS)
def test_export(backend: str) -> None:
    case = CASES["odd-stride"]
    x, *weights = case.inputs(torch.float32, checks.device_for(backend))

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return case.run((x, *weights), backend)

    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Layer(), (x,), dynamic_shapes=shapes)
    assert "kernelpose.inverted_bottleneck" in program.graph_module.code
    other = torch.randn(5, *x.shape[1:], device=x.device)
    assert torch.equal(program.module()(other), Layer()(other))


X = torch.zeros(2, 4, 6, 5)
WEIGHTS = tuple(
    torch.zeros(s) for s in ((8, 4, 1, 1), (8,), (8, 1, 3, 3), (8,), (4, 8, 1, 1), (4,))
)


def replaced(index: int, tensor: Any) -> tuple[Any, ...]:
    tensors: list[Any] = [X, *WEIGHTS]
    tensors[index] = tensor
    return tuple(tensors)


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        (replaced(0, [1.0]), {}, TypeError, "x is list; expected a tensor"),
        (replaced(1, None), {}, TypeError, "expand is NoneType; expected a tensor"),
        (
            replaced(5, WEIGHTS[4].half()),
            {},
            TypeError,
            r"project is torch\.float16; expected torch",
        ),
        (replaced(0, X[0]), {}, ValueError, r"x has shape \(4, 6, 5\); expected \(B, C, H, W\)"),
        (replaced(0, X[:, :3]), {}, ValueError, r"expand has shape .*; expected \(8, 3, 1, 1\)"),
        (replaced(2, X), {}, ValueError, r"expand_bias has shape .*; expected \(8,\)"),
        (replaced(3, None), {}, ValueError, "depthwise_bias is given without depthwise"),
        (replaced(5, WEIGHTS[0]), {}, ValueError, r"project has shape .*; expected \(8, 8, 1, 1\)"),
        (replaced(6, WEIGHTS[5].long()), {}, TypeError, "project_bias is torch.int64; expected"),
        (replaced(6, WEIGHTS[5].to("meta")), {}, ValueError, "project_bias is on meta; expected"),
        ((X, *WEIGHTS), {"stride": 3}, ValueError, "stride is 3; expected 1, or 2 with"),
        (
            (X, *WEIGHTS),
            {"stride": 2, "residual": True},
            ValueError,
            "residual is True; expected stride 1 and 4 outputs",
        ),
        (
            (X, *WEIGHTS),
            {"activations": ("gelu", "none")},
            ValueError,
            r"activations is \('gelu', 'none'\); expected two of none, relu, silu",
        ),
        ((X, *WEIGHTS), {"backend": "torch"}, kernelpose.BackendError, "has no torch backend"),
        (
            tuple(t.double() for t in (X, *WEIGHTS)),
            {"backend": "cpu"},
            kernelpose.BackendError,
            "float64",
        ),
    ],
)
def test_errors_name_the_argument(
    args: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        inverted_bottleneck(*args, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
