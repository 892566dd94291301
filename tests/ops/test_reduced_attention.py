"""reduced_attention: every backend against the reference, and the reference against its meaning."""

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
from kernelpose.ops import reduced_attention
from tests.ops import checks
from tests.parity import assert_parity

KERNELS = ("cpu", "cuda", "triton")


@dataclass(frozen=True)
class Case:
    queries: int
    keys: int
    heads: int
    head_dim: int
    batch: int = 2
    scale: float | None = None
    op: str = "reduced_attention"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of q."""
        return self.batch, self.queries, self.heads * self.head_dim

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """q and kv."""
        generator = torch.Generator().manual_seed(0)
        batch, _, channels = self.shape
        shapes = (self.shape, (batch, self.keys, 2 * channels))
        draws = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        return [x.to(device, dtype).requires_grad_() for x in draws]

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(inputs), {"num_heads": self.heads, "scale": self.scale}

    def run(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        args, options = self.arguments(inputs)
        return reduced_attention(*args, **options, backend=backend)


CASES = {
    "small": Case(5, 3, 2, 8),
    "stage1": Case(512, 48, 1, 64, batch=1),
    "stage2": Case(96, 48, 2, 64, scale=0.3),
    "stage3-b0": Case(100, 48, 5, 32, batch=1),
    "stage4": Case(48, 48, 8, 64, batch=1),
    "stage1-384": Case(400, 108, 1, 64, batch=1),
    "odd": Case(37, 29, 3, 20),
    "odd-chunks": Case(400, 13, 1, 12, batch=1),
    "many-keys": Case(20, 301, 1, 40),
    "panel": Case(50, 64, 1, 80, batch=1),
    "widest-head": Case(20, 70, 1, 128, batch=1),
    "narrow-head": Case(19, 17, 2, 1),
    "one-query": Case(1, 2, 2, 8),
    "many-units": Case(7, 5, 6, 8, batch=3),
    "batch-0": Case(4, 4, 2, 8, batch=0),
    "no-queries": Case(0, 4, 2, 8),
}


@pytest.mark.parametrize(("case", "backend", "dtype"), checks.parity_matrix(CASES))
def test_parity(case: Case, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    checks.check_parity(case, backend, dtype)


@pytest.mark.parametrize("backend", [*KERNELS, "torch", "eager"])
def test_meaning_query_by_query(backend: str) -> None:
    case = CASES["small"]
    q, kv = (x.detach() for x in case.inputs(torch.float32, checks.device_for(backend)))
    got = case.run([q, kv], backend)
    for image, head, i in ((0, 0, 0), (1, 1, 4), (0, 1, 2)):
        own = slice(8 * head, 8 * head + 8)
        keys, values = kv[image, :, :16][:, own], kv[image, :, 16:][:, own]
        exponentials = [math.exp(sum(q[image, i, own] * key) / math.sqrt(8)) for key in keys]
        expected = sum(e * v for e, v in zip(exponentials, values, strict=True))
        torch.testing.assert_close(got[image, i, own], expected / sum(exponentials))


@pytest.mark.parametrize("name", ["small", "odd", "narrow-head", "one-query"])
def test_gradcheck(name: str) -> None:
    """The C++ backward in float64 against finite differences."""
    given = CASES[name]
    case = Case(min(given.queries, 4), min(given.keys, 5), given.heads, min(given.head_dim, 3))
    torch.autograd.gradcheck(lambda *x: case.run(x, "cpu"), case.inputs(torch.float64))


@pytest.mark.parametrize("backend", KERNELS)
def test_one_key_is_copied(backend: str) -> None:
    case = Case(3, 1, 2, 8)
    q, kv = case.inputs(torch.float32, checks.device_for(backend))
    out = case.run((q, kv), backend)
    torch.testing.assert_close(out, kv[:, :, 16:].expand_as(out))
    grad = torch.randn_like(out)
    grad_q, grad_kv = torch.autograd.grad(out, (q, kv), grad)
    expected = torch.cat((torch.zeros_like(grad), grad), 2).sum(1, keepdim=True)
    torch.testing.assert_close(grad_kv, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_q, torch.zeros_like(q), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "stage2"])
def test_non_contiguous_inputs_and_gradient(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    expected = case.run(inputs, backend)
    strided = [x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in inputs]
    strided = [x.requires_grad_() for x in strided]
    assert not any(x.is_contiguous() for x in strided)
    got = case.run(strided, backend)
    assert torch.equal(got, expected) and got.is_contiguous()
    grad = torch.ones(1, device=got.device).expand_as(got)
    pairs = (torch.autograd.grad(*pair, grad) for pair in ((got, strided), (expected, inputs)))
    assert all(torch.equal(*both) for both in zip(*pairs, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "odd-chunks", "stage1-384"])
def test_deterministic_whatever_the_threads(name: str, backend: str) -> None:
    checks.check_deterministic(CASES[name], backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "odd"])
def test_inputs_are_never_written_wherever_they_start(name: str, backend: str) -> None:
    checks.check_inputs_kept(CASES[name], backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "odd", "many-keys"])
def test_large_scores_and_nan(name: str, backend: str) -> None:
    case = CASES[name]
    q, kv = (1e4 * x.detach() for x in case.inputs(torch.float32, checks.device_for(backend)))
    assert all(case.run([q, kv], b).isfinite().all() for b in (backend, "eager"))
    q[0, 0, 0] = torch.nan
    kv[1, 1, 0] = torch.nan
    got, expected = (case.run([q, kv], b).isnan() for b in (backend, "eager"))
    assert torch.equal(got, expected) and got.any() and not got.all()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "batch-0", "no-queries"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(name: str, grad: bool, backend: str) -> None:
    inputs = CASES[name].inputs(torch.float32, checks.device_for(backend))
    args = (*(x.detach().requires_grad_(grad) for x in inputs), CASES[name].heads, 0.5, backend)
    torch.library.opcheck(torch.ops.kernelpose.reduced_attention.default, args)


@pytest.mark.parametrize("backend", [*KERNELS, "torch", "eager"])
def test_compiles_to_one_graph(backend: str) -> None:
    case = CASES["small"]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    checks.check_compile(lambda *x: case.run(x, backend), *inputs)


class _Attend(torch.nn.Module):
    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        return reduced_attention(q, kv, num_heads=2)


@pytest.mark.parametrize("backend", KERNELS)
def test_export(backend: str) -> None:
    """The program holds the op, and takes any batch and any numbers of queries and keys."""
    device = checks.device_for(backend)
    batch, queries, keys = (torch.export.Dim(name) for name in ("batch", "queries", "keys"))
    shapes = ({0: batch, 1: queries}, {0: batch, 1: keys})
    given, others = (
        (torch.randn(b, n, 16, device=device), torch.randn(b, m, 32, device=device))
        for b, n, m in ((2, 9, 5), (3, 14, 6))
    )
    with kernelpose.backend(backend):
        program = torch.export.export(_Attend(), given, dynamic_shapes=shapes)
        expected = reduced_attention(*others, num_heads=2)
    assert "kernelpose.reduced_attention" in program.graph_module.code
    torch.testing.assert_close(program.module()(*others), expected)


@pytest.mark.parametrize("backend", [*KERNELS, "torch", "eager"])
def test_autocast(backend: str) -> None:
    """q and kv are cast, whatever the one or the other was."""
    case, device = CASES["small"], checks.device_for(backend)
    q, kv = case.inputs(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        outputs = [case.run(x, backend) for x in ((q, kv), (q.bfloat16(), kv), (q, kv.bfloat16()))]
    assert all(x.dtype == torch.bfloat16 and torch.equal(x, outputs[0]) for x in outputs)
    gradients = torch.autograd.grad(outputs[0].sum(), (q, kv))
    assert all(x.dtype == torch.float32 for x in gradients)
    with torch.autocast(device, torch.bfloat16):
        wide = [x.detach().double() for x in (q, kv)]
        assert case.run(wide, "eager").dtype == torch.float64


@pytest.mark.parametrize("backend", KERNELS)
def test_autocast_of_the_registered_op(backend: str) -> None:
    case, device = CASES["small"], checks.device_for(backend)
    q, kv = case.inputs(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        out, lse = torch.ops.kernelpose.reduced_attention(q, kv, case.heads, 0.5, backend)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32


@pytest.mark.parametrize("backend", KERNELS)
def test_inference_mode_and_the_way_around_the_dispatcher(backend: str) -> None:
    checks.check_around_dispatcher(CASES["odd"], backend)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of SDPA
@pytest.mark.parametrize("backend", KERNELS)
def test_function_transforms(backend: str) -> None:
    """torch.func sees plain PyTorch, which agrees with the kernel's own backward."""
    case = Case(4, 3, 2, 8, batch=3)
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    q, kv = (x.detach() for x in inputs)

    def total(a: Tensor, b: Tensor, name: str | None = None) -> Tensor:
        return reduced_attention(a[None], b[None], num_heads=2, backend=name).square().sum()

    transformed, exact = (
        torch.func.vmap(torch.func.grad(total))(a, b)
        for a, b in ((q, kv), (q.double(), kv.double()))
    )
    leaf = q.clone().requires_grad_()
    torch.stack([total(a, b, backend) for a, b in zip(leaf, kv, strict=True)]).sum().backward()
    assert leaf.grad is not None
    assert_parity(leaf.grad, transformed, exact)


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivative_is_refused_and_eager_has_it(backend: str) -> None:
    case = CASES["small"]
    q, kv = case.inputs(torch.float32, checks.device_for(backend))
    for name in (backend, "eager"):
        out = case.run((q, kv), name)
        (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        if name == backend:
            with pytest.raises(RuntimeError, match=f"backend is '{backend}'; expected 'eager' for"):
                torch.autograd.grad(first.square().sum(), q)
        else:
            assert torch.autograd.grad(first.square().sum(), q)[0].abs().max() > 0


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", ["stage1", "odd", "many-keys"])
def test_side_stream_and_graph_capture(name: str, backend: str) -> None:
    checks.check_side_stream(CASES[name], backend)
    checks.check_graph_capture(CASES[name], backend)


@pytest.mark.parametrize(
    ("backend", "within", "beyond", "text"),
    [
        ("cpu", Case(4, 4, 1, 128), Case(4, 4, 1, 129), "its head width is at most 128, and this"),
        ("cuda", Case(4, 4, 1, 128), Case(4, 4, 1, 129), "its head width is at most 128, and this"),
        ("triton", Case(4, 4, 1, 128), Case(4, 4, 1, 129), "its head width is at most 128, and"),
        ("cpu", Case(4, 4, 2**29, 1), Case(4, 4, 2**30, 1), f"{2**31} channels of kv, and this"),
        ("cpu", Case(2**30 - 1, 4, 1, 8), Case(2**30, 4, 1, 8), "queries of an image, and this"),
        ("cpu", Case(4, 2**30 - 1, 1, 8), Case(4, 2**30, 1, 8), "keys of an image, and this has"),
        ("cuda", Case(2**20, 4, 2**10, 8, 1), Case(2**20, 4, 2**10, 8), "tokens of all images and"),
        ("triton", Case(4, 2**20, 2**10, 8, 1), Case(4, 2**20, 2**10, 8), "tokens of all images"),
    ],
)
def test_no_room_is_an_objection(backend: str, within: Case, beyond: Case, text: str) -> None:
    def objection(case: Case) -> str | None:
        batch, queries, channels = case.shape
        q = torch.empty(1, device="meta").expand(batch, queries, channels)
        kv = torch.empty(1, device="meta").expand(batch, case.keys, 2 * channels)
        args, options = case.arguments([q, kv])
        return OPS[case.op].objection(backend, *args, **options)

    assert objection(within) is None
    assert text in (objection(beyond) or "")


Q, KV = torch.zeros(2, 6, 8), torch.zeros(2, 3, 16)


@pytest.mark.parametrize(
    ("q", "kv", "options", "error", "text"),
    [
        ([1.0], KV, {}, TypeError, "q is list; expected a tensor"),
        (Q, None, {}, TypeError, "kv is NoneType; expected a tensor"),
        (Q.long(), KV, {}, TypeError, r"q is torch\.int64; expected a floating-point"),
        (Q[0], KV, {}, ValueError, r"q has shape \(6, 8\); expected \(B, N, C\)"),
        (Q[..., :0], KV, {}, ValueError, r"q has shape \(2, 6, 0\); expected \(B, N, C\), C >= 1"),
        (Q, KV[0], {}, ValueError, r"kv has shape \(3, 16\); expected \(2, M, 16\), M >= 1"),
        (Q, KV[:1], {}, ValueError, r"kv has shape \(1, 3, 16\); expected \(2, M, 16\)"),
        (Q, KV[:, :0], {}, ValueError, r"kv has shape \(2, 0, 16\); expected \(2, M, 16\), M >= 1"),
        (Q, KV[..., :8], {}, ValueError, r"kv has shape \(2, 3, 8\); expected \(2, M, 16\)"),
        (Q, KV.half(), {}, TypeError, r"kv is torch\.float16; expected torch\.float32, as q"),
        (Q, KV.to("meta"), {}, ValueError, "kv is on meta; expected cpu, as q"),
        (
            Q,
            KV,
            {"num_heads": 3},
            ValueError,
            "num_heads is 3; expected a divisor of C, which is 8",
        ),
        (Q, KV, {"num_heads": 0}, ValueError, "num_heads is 0; expected a divisor of C"),
        (Q, KV, {"scale": "a"}, TypeError, "scale is 'a'; expected a number or None"),
        (Q, KV, {"backend": "metal"}, ValueError, "backend is 'metal'"),
    ],
)
def test_errors_name_the_argument(
    q: Any, kv: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        reduced_attention(q, kv, **{"num_heads": 2, **options})
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
