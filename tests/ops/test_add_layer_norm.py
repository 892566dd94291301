"""add_layer_norm: every backend against the reference, and the reference against LayerNorm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernelpose
from kernelpose.backend import OPS
from kernelpose.ops import add_layer_norm
from tests.ops import checks
from tests.parity import assert_parity

KERNELS = ("cpu", "cuda", "triton")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]  # (..., C)
    eps: float = 1e-5
    mean: float = 0.0
    op: str = "add_layer_norm"

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        wide = dtype if dtype == torch.float64 else torch.float32
        shapes = (self.shape, self.shape, self.shape[-1:], self.shape[-1:])
        draw = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        draw[1] += self.mean
        dtypes = (dtype, dtype, wide, wide)
        return [t.to(device, d).requires_grad_() for t, d in zip(draw, dtypes, strict=True)]

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(inputs), {"eps": self.eps}

    def run(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        """The sum and the norm as one tensor."""
        args, options = self.arguments(inputs)
        return torch.stack(add_layer_norm(*args, **options, backend=backend))


CASES = {
    "small": Case((2, 3, 8)),
    "vitpose": Case((1, 100, 768)),
    "vitpose-map": Case((2, 3, 2, 768), eps=1e-6),
    "vitpose-huge": Case((1, 9, 1280)),
    "pvt-1": Case((1, 600, 64)),
    "pvt-2": Case((1, 70, 128)),
    "pvt-3": Case((1, 13, 320)),
    "pvt-4": Case((2, 48, 512)),
    "odd": Case((3, 5, 37)),
    "wide": Case((2, 3, 2100)),
    "wide-odd": Case((2, 2, 2701)),
    "far-from-zero": Case((2, 5, 96), mean=30.0),
    "large-eps": Case((2, 7, 24), eps=3.0),
    "one-row": Case((40,)),
    "one-channel": Case((2, 5, 1), eps=1.0),
    "batch-0": Case((0, 3, 8)),
}
MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.bfloat16),
]


@pytest.mark.parametrize(("case", "backend", "dtype"), checks.parity_matrix(CASES))
def test_parity(case: Case, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    checks.check_parity(case, backend, dtype)


def test_reference_is_layer_norm_of_the_sum() -> None:
    """As its paper has it, row by row."""
    x, residual, weight, bias = (t.detach() for t in CASES["odd"].inputs(torch.float64))
    total, norm = add_layer_norm(x, residual, weight, bias, backend="eager")
    torch.testing.assert_close(total, x + residual)
    for row, got in zip(total.view(-1, 37), norm.view(-1, 37), strict=True):
        values = row.tolist()
        mean = sum(values) / len(values)
        deviation = (sum((v - mean) ** 2 for v in values) / len(values) + 1e-5) ** 0.5
        torch.testing.assert_close(got, (row - mean) / deviation * weight + bias)


def test_gradcheck() -> None:
    """The C++ backward in float64 against finite differences."""
    inputs = Case((2, 3, 11)).inputs(torch.float64)
    torch.autograd.gradcheck(lambda *x: add_layer_norm(*x, backend="cpu"), inputs)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("of_x", "of_residual"), MIXED, ids=str)
@pytest.mark.parametrize("name", ["odd", "pvt-3", "wide"])
def test_two_dtypes(
    name: str, of_x: torch.dtype, of_residual: torch.dtype, backend: str, poisoned: None
) -> None:
    """The sum has the dtype of x + residual, and each gradient its input's."""
    case, device = CASES[name], checks.device_for(backend)
    if backend == "triton" and checks.TRITON_INTERPRETED and torch.bfloat16 in (of_x, of_residual):
        pytest.skip("triton: its interpreter computes bfloat16 wrongly")
    x, residual, *parameters = (t.detach() for t in case.inputs(torch.float32, device))
    given = [x.to(of_x), residual.to(of_residual), *parameters]
    dtype = (given[0] + given[1]).dtype
    grads = torch.randn(2, *case.shape, generator=torch.Generator().manual_seed(1)).to(x)
    results = []
    for which, widen in ((backend, False), ("eager", False), ("eager", True)):
        leaves = [(t.double() if widen else t.clone()).requires_grad_() for t in given]
        out = case.run(leaves, which)
        results.append([out.detach(), *checks.gradients(out, leaves, grads.to(dtype))])
        assert out.dtype == (torch.float64 if widen else dtype)
    for got, eager, exact, leaf in zip(*results, [out, *given], strict=True):
        assert got.dtype == eager.dtype
        assert_parity(got, eager, exact, dtype=leaf.dtype if leaf is not out else dtype)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
        (torch.float32, torch.float64, torch.float64),
        (torch.float16, torch.float16, torch.float32),
    ],
    ids=str,
)
def test_dtypes_of_parameters(dtypes: tuple[torch.dtype, ...], backend: str) -> None:
    """They are taken as they are, not rounded, and their gradients have their dtypes."""
    device = checks.device_for(backend)
    if backend == "triton" and checks.TRITON_INTERPRETED and torch.bfloat16 in dtypes:
        pytest.skip("triton: its interpreter computes bfloat16 wrongly")
    of_x, of_weight, of_bias = dtypes
    x, residual, weight, bias = (t.detach() for t in CASES["pvt-3"].inputs(torch.float32, device))
    given = [x.to(of_x), residual.to(of_x), weight.to(of_weight), bias.to(of_bias)]
    results = []
    for name in (backend, "eager"):
        leaves = [t.clone().requires_grad_() for t in given]
        out = torch.stack(add_layer_norm(*leaves, backend=name))
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, eager in zip(*results, strict=True):
        assert ours.dtype == eager.dtype
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2 * eager.abs().max().item())


@pytest.mark.parametrize("backend", KERNELS)
def test_any_strides(backend: str) -> None:
    """Transposed, expanded and sliced inputs and gradients give what contiguous ones give."""
    x, residual, weight, bias = (
        t.detach() for t in CASES["odd"].inputs(torch.float32, checks.device_for(backend))
    )
    residual = residual[:, :1].expand_as(x)
    layouts = (
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.stack([t, t], -1)[..., 1],
    )
    grad = torch.randn(37, 5, 3, generator=torch.Generator().manual_seed(1)).to(x).permute(2, 1, 0)

    def run(tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        total, norm = add_layer_norm(*leaves, backend=backend)
        assert total.is_contiguous() and norm.is_contiguous()
        gradients = torch.autograd.grad([total, norm], leaves, [grad, grad])
        return [total.detach(), norm.detach(), *gradients]

    expected = run([t.contiguous() for t in (x, residual, weight, bias)], grad.contiguous())
    for layout in layouts:
        vectors = [layout(t.expand(2, -1))[1] for t in (weight, bias)]
        got = run([layout(x), residual, *vectors], grad)
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("of_x", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("which", ["sum", "norm"])
def test_gradient_of_one_result(which: str, of_x: torch.dtype, backend: str) -> None:
    """The other one's is zero, and is not read."""
    x, residual, weight, bias = CASES["odd"].inputs(torch.float32, checks.device_for(backend))
    leaves = [x.detach().to(of_x).requires_grad_(), residual, weight, bias]
    gradients = []
    for name in (backend, "eager"):
        out = add_layer_norm(*leaves, backend=name)[which == "norm"]
        gradients.append(torch.autograd.grad(out.square().sum(), leaves, allow_unused=True))
    for ours, eager in zip(*gradients, strict=True):
        if eager is None:
            assert ours is None
        else:
            assert ours.dtype == eager.dtype
            rtol = 1e-5 if eager.dtype == torch.float32 else 2e-3
            torch.testing.assert_close(ours, eager, rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("backend", KERNELS)
def test_nan_spreads_over_its_row_alone(backend: str) -> None:
    x, *rest = CASES["odd"].inputs(torch.float32, checks.device_for(backend))
    with torch.no_grad():
        x[1, 2, 3] = torch.nan
    total, norm = add_layer_norm(x, *rest, backend=backend)
    assert total.isnan().sum() == 1
    assert norm[1, 2].isnan().all() and norm.isnan().sum() == 37


@pytest.mark.parametrize("backend", KERNELS)
def test_half_types_are_summed_in_float32(backend: str) -> None:
    """The squares of these numbers overflow float16."""
    device = checks.device_for(backend)
    x = torch.tensor([2000.0, -2000.0] * 24, dtype=torch.float16, device=device).expand(3, 48)
    weight = torch.ones(48, device=device)
    total, norm = add_layer_norm(x, x, weight, 0 * weight, backend=backend)
    assert torch.equal(total, 2 * x) and torch.equal(norm, x.sign())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "vitpose", "pvt-1"])
def test_deterministic_whatever_the_threads(name: str, backend: str) -> None:
    checks.check_deterministic(CASES[name], backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "pvt-3"])
def test_inputs_are_never_written_wherever_they_start(name: str, backend: str) -> None:
    """Views that start in the middle of a vector give what others give."""
    checks.check_inputs_kept(CASES[name], backend, exact=backend == "cpu")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "batch-0"])
@pytest.mark.parametrize("of_x", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(name: str, of_x: torch.dtype, grad: bool, backend: str) -> None:
    x, *rest = CASES[name].inputs(torch.float32, checks.device_for(backend))
    tensors = (t.detach().requires_grad_(grad) for t in (x.to(of_x), *rest))
    torch.library.opcheck(torch.ops.kernelpose.add_layer_norm.default, (*tensors, 1e-6, backend))


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_compiles_to_one_graph(backend: str) -> None:
    case = CASES["small"]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    checks.check_compile(lambda *x: case.run(x, backend), *inputs)
    mixed = [inputs[0].detach().bfloat16().requires_grad_(), *inputs[1:]]
    if backend != "triton" or not checks.TRITON_INTERPRETED:
        checks.check_compile(lambda *x: add_layer_norm(*x, backend=backend)[1], *mixed)


class AddNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, residual, self.norm.weight, self.norm.bias)


@pytest.mark.parametrize("backend", KERNELS)
def test_export(backend: str) -> None:
    """The program holds the op, and takes any batch and number of tokens."""
    device = checks.device_for(backend)
    module = AddNorm(8).to(device).eval()
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    inputs = (torch.randn(2, 6, 8, device=device), torch.randn(2, 6, 8, device=device))
    others = (torch.randn(3, 9, 8, device=device), torch.randn(3, 9, 8, device=device))
    with kernelpose.backend(backend):
        program = torch.export.export(module, inputs, dynamic_shapes=(dims, dims))
        expected = module(*others)
    assert "kernelpose.add_layer_norm" in program.graph_module.code
    torch.testing.assert_close(program.module()(*others), expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_autocast_leaves_it_alone(backend: str) -> None:
    checks.check_autocast_leaves_alone(CASES["small"], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_inference_mode_and_the_way_around_the_dispatcher(backend: str) -> None:
    checks.check_around_dispatcher(CASES["odd"], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_function_transforms(backend: str) -> None:
    """torch.func sees plain PyTorch, which agrees with the kernel's own backward."""
    x, residual, weight, bias = (
        t.detach() for t in CASES["small"].inputs(torch.float32, checks.device_for(backend))
    )

    def total(x: Tensor, name: str | None = None) -> Tensor:
        rest = (t.to(x.dtype) for t in (residual[0], weight, bias))
        return torch.stack(add_layer_norm(x, *rest, backend=name)).square().sum()

    transformed, exact = (torch.func.vmap(torch.func.grad(total))(t) for t in (x, x.double()))
    leaf = x.clone().requires_grad_()
    torch.stack([total(row, backend) for row in leaf]).sum().backward()
    assert leaf.grad is not None
    assert_parity(leaf.grad, transformed, exact)


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivative_is_refused_and_eager_has_it(backend: str) -> None:
    x, *rest = CASES["small"].inputs(torch.float32, checks.device_for(backend))
    for name in (backend, "eager"):
        out = torch.stack(add_layer_norm(x, *rest, backend=name))
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        if name == backend:
            with pytest.raises(RuntimeError, match=f"backend is '{backend}'; expected 'eager' for"):
                torch.autograd.grad(first.square().sum(), x)
        else:
            assert torch.autograd.grad(first.square().sum(), x)[0].abs().max() > 0


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", ["vitpose", "odd"])
def test_side_stream_and_graph_capture(name: str, backend: str) -> None:
    checks.check_side_stream(CASES[name], backend)
    checks.check_graph_capture(CASES[name], backend)


def test_what_is_too_large_or_too_wide_is_an_objection() -> None:
    objection = OPS["add_layer_norm"].objection
    many, some, wide = (
        torch.empty(s, device="meta") for s in ((2**31, 8), (2**31 - 1, 8), (2, 8193))
    )
    for backend in ("cuda", "triton"):
        assert objection(backend, many, many) == (
            f"it takes fewer than {2**31} rows, and this has {2**31}"
        )
        assert objection(backend, some, some) is None
        assert objection(backend, some, some.double()) == "it does not compute float64"
    assert objection("triton", wide, wide) == "it takes at most 8192 channels, and this has 8193"
    assert all(objection("cpu", t, t.double()) is None for t in (many, wide))


ZEROS = torch.zeros(2, 3, 8)
EIGHT = torch.zeros(8)


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        (([1.0], ZEROS, EIGHT, EIGHT), {}, TypeError, "x is list; expected a tensor"),
        ((ZEROS, None, EIGHT, EIGHT), {}, TypeError, "residual is NoneType; expected a tensor"),
        ((ZEROS.int(), ZEROS, EIGHT, EIGHT), {}, TypeError, r"x is torch\.int32; expected a float"),
        (
            (EIGHT[0], EIGHT[0], EIGHT, EIGHT),
            {},
            ValueError,
            r"x has shape \(\); expected \(\.\.\., C\)",
        ),
        (
            (ZEROS, ZEROS[0], EIGHT, EIGHT),
            {},
            ValueError,
            r"residual has shape \(3, 8\); expected \(2, 3, 8\), as x",
        ),
        ((ZEROS, ZEROS.to("meta"), EIGHT, EIGHT), {}, ValueError, "residual is on meta; expected"),
        ((ZEROS, ZEROS, None, EIGHT), {}, TypeError, "weight is NoneType; expected a tensor"),
        (
            (ZEROS, ZEROS, EIGHT[:7], EIGHT),
            {},
            ValueError,
            r"weight has shape \(7,\); expected \(8,\), one element for each channel of x",
        ),
        ((ZEROS, ZEROS, EIGHT, EIGHT.int()), {}, TypeError, r"bias is torch\.int32; expected"),
        ((ZEROS, ZEROS, EIGHT, EIGHT.to("meta")), {}, ValueError, "bias is on meta; expected cpu"),
        ((ZEROS, ZEROS, EIGHT, EIGHT), {"eps": "1"}, TypeError, "eps is '1'; expected a number"),
        ((ZEROS, ZEROS, EIGHT, EIGHT), {"eps": -1.0}, ValueError, r"eps is -1\.0; expected at"),
        ((ZEROS, ZEROS, EIGHT, EIGHT), {"backend": "metal"}, ValueError, "backend is 'metal'"),
    ],
)
def test_errors_name_the_argument(
    args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        add_layer_norm(*args, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
