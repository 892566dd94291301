"""window_attention inside PyTorch: compiled, exported, cast, transformed, captured, derived twice.

Every test runs on each backend that this machine has.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernelpose
from kernelpose.nn import WindowAttention
from kernelpose.ops import window_attention
from tests.ops import checks
from tests.ops.test_window_attention import CASES, KERNELS
from tests.parity import assert_parity


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "full", "batch-0"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(name: str, grad: bool, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    inputs = [x.detach().requires_grad_(grad) for x in inputs]
    options = (
        case.heads, list(case.window or case.size), list(case.shift), case.partition,
        case.pooled, 0.5, backend,
    )  # fmt: skip
    args = (inputs[0], inputs[1] if case.bias else None, *options)
    torch.library.opcheck(torch.ops.kernelpose.window_attention.default, args)


@pytest.mark.parametrize(
    ("name", "backend"),
    [*itertools.product(["small", "full", "grid"], [*KERNELS, "eager"]), ("full", "torch")],
)
def test_compiles_to_one_graph(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    checks.check_compile(lambda *x: case.run(x, backend), *inputs)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", ["small", "shifted-pooled"])
def test_side_stream_and_graph_capture(name: str, backend: str) -> None:
    checks.check_side_stream(CASES[name], backend)
    checks.check_graph_capture(CASES[name], backend)


@pytest.mark.full
@pytest.mark.parametrize("backend", KERNELS)
def test_compiles_with_inductor_and_dynamic_sizes(backend: str) -> None:
    device = checks.device_for(backend)

    def run(qkv: Tensor) -> Tensor:
        return window_attention(qkv, num_heads=2, window=(4, 4), shift=(2, 2), backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for batch, height, width in ((1, 8, 8), (3, 9, 7), (2, 16, 12)):
        qkv = torch.randn(batch, height, width, 48, device=device)
        torch.testing.assert_close(compiled(qkv), run(qkv))


@pytest.mark.parametrize("backend", KERNELS)
def test_compiled_code_follows_the_chosen_backend(backend: str) -> None:
    torch._dynamo.reset()
    qkv = torch.randn(1, 8, 8, 48, device=checks.device_for(backend))
    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(
        lambda x: window_attention(x, num_heads=2, window=(4, 4)), fullgraph=True, backend=record
    )
    for name in (backend, "eager"):
        with kernelpose.backend(name):
            compiled(qkv)
    assert ["kernelpose.window_attention" in code for code in graphs] == [True, False]
    assert f"'{backend}'" in graphs[0]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = WindowAttention(
            32, 2, window=(4, 4), shift=(2, 2), relative_position=True, pooled=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("backend", KERNELS)
def test_export(backend: str, strict: bool) -> None:
    """The program holds the op, and batch and height of the map have no upper bound."""
    device = checks.device_for(backend)
    block, x = _Block().to(device).eval(), torch.randn(2, 9, 7, 32, device=device)
    other = torch.randn(5, 13, 7, 32, device=device)
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("height", min=4)},)
    with kernelpose.backend(backend):
        program = torch.export.export(block, (x,), dynamic_shapes=shapes, strict=strict)
        expected = block(other)
    assert "kernelpose.window_attention" in program.graph_module.code
    assert f"'{backend}'" in program.graph_module.code
    torch.testing.assert_close(program.module()(other), expected)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_autocast(backend: str) -> None:
    device = checks.device_for(backend)
    block, x = _Block().to(device), torch.randn(2, 9, 7, 32, device=device)
    seen: list[torch.dtype] = []
    hook = block.attention.proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].dtype)
    )
    with kernelpose.backend(backend), torch.autocast(device, torch.bfloat16):
        block(x).sum().backward()
    hook.remove()
    assert seen == [torch.bfloat16]
    table = block.attention.relative_position_bias_table
    assert table is not None and table.grad is not None and table.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", KERNELS)
def test_autocast_of_the_registered_op(backend: str) -> None:
    device = checks.device_for(backend)
    qkv = torch.randn(1, 4, 4, 24, device=device)
    options = (2, [4, 4], [0, 0], "window", False, 0.5, backend)
    with torch.autocast(device, torch.bfloat16):
        out, _ = torch.ops.kernelpose.window_attention(qkv, None, *options)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", KERNELS)
def test_inference_mode_and_the_way_around_the_dispatcher(backend: str) -> None:
    case = CASES["small"]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    registered = case.run(inputs, backend)
    assert registered.grad_fn is not None
    with torch.inference_mode():
        direct = case.run([x.detach() for x in inputs], backend)
    assert torch.equal(direct, registered)


@pytest.mark.parametrize("backend", KERNELS)
def test_function_transforms(backend: str) -> None:
    """torch.func sees plain PyTorch, which agrees with the kernel's own backward."""
    qkv = torch.randn(3, 1, 4, 4, 24, device=checks.device_for(backend))

    def total(x: Tensor, name: str | None = None) -> Tensor:
        return window_attention(x, num_heads=2, window=(2, 2), backend=name).square().sum()

    transformed, exact = (torch.func.vmap(torch.func.grad(total))(x) for x in (qkv, qkv.double()))
    leaf = qkv.clone().requires_grad_()
    torch.stack([total(x, backend) for x in leaf]).sum().backward()
    assert leaf.grad is not None
    assert_parity(leaf.grad, transformed, exact)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", KERNELS)
def test_jit_trace_keeps_the_op(backend: str) -> None:
    qkv, other = torch.randn(2, 1, 4, 4, 24, device=checks.device_for(backend)).unbind()

    def run(x: Tensor) -> Tensor:
        return window_attention(x, num_heads=2, window=(2, 2), backend=backend)

    with torch.no_grad():
        traced = torch.jit.trace(run, (qkv,))
    assert "kernelpose::window_attention" in str(traced.graph)
    assert torch.equal(traced(other), run(other))


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivative_is_refused_and_eager_has_it(backend: str) -> None:
    qkv = torch.randn(1, 4, 4, 24, device=checks.device_for(backend)).requires_grad_()
    for name in (backend, "eager"):
        out = window_attention(qkv, num_heads=2, window=(2, 2), backend=name)
        (first,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
        if name == backend:
            refusal = f"backend is '{backend}'; expected 'eager' for a second derivative"
            with pytest.raises(RuntimeError, match=refusal):
                torch.autograd.grad(first.square().sum(), qkv)
        else:
            assert torch.autograd.grad(first.square().sum(), qkv)[0].abs().max() > 0


def _tangent(qkv: Tensor, direction: Tensor, backend: str | None = None) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(qkv, direction)
        out = window_attention(dual, num_heads=2, window=(2, 2), backend=backend)
        tangent: Tensor = torch.autograd.forward_ad.unpack_dual(out).tangent
    return tangent


def test_forward_mode_derivative() -> None:
    qkv, direction = torch.randn(2, 1, 4, 4, 24, dtype=torch.float64).unbind()
    step = 1e-6 * direction
    ahead, behind = (window_attention(qkv + s, num_heads=2, window=(2, 2)) for s in (step, -step))
    expected = (ahead - behind) / 2e-6
    torch.testing.assert_close(_tangent(qkv, direction), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", KERNELS)
def test_forward_mode_is_eager_where_a_kernel_would_be_chosen(backend: str) -> None:
    qkv, direction = torch.randn(2, 1, 4, 4, 24, device=checks.device_for(backend)).unbind()
    assert torch.equal(_tangent(qkv, direction), _tangent(qkv, direction, "eager"))
    with pytest.raises(kernelpose.BackendError, match="forward-mode derivatives need plain"):
        _tangent(qkv, direction, backend)
