"""Checks that every op passes, on every backend: each op's test file gives its cases to these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from kernelpose import _native
from kernelpose.backend import OPS, TRITON_INTERPRETED
from tests.parity import assert_parity


class Case(Protocol):
    """Inputs and options of one call of an op."""

    op: str

    def inputs(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Fresh differentiable inputs, the main tensor first, drawn from a fixed seed."""

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the op's public function is called with for these inputs."""

    def run(self, inputs: Sequence[Tensor], backend: str) -> Tensor:
        """The public function on these inputs."""


def parity_matrix(cases: Mapping[str, Case]) -> list[Any]:
    """(case, backend, dtype) of all that an op declares and no objection rules out, but eager."""
    matrix = []
    for name, case in cases.items():
        spec = OPS[case.op]
        for backend, dtypes in spec.dtypes.items():
            for dtype in dtypes:
                args, options = case.arguments(case.inputs(dtype, "meta"))
                if backend == "eager" or spec.objection(backend, *args, **options):
                    continue
                label = f"{name}-{backend}-{str(dtype).removeprefix('torch.')}"
                matrix.append(pytest.param(case, backend, dtype, id=label))
    return matrix


def device_for(backend: str) -> str:
    """Where a backend's tensors live on this machine; skips, or fails, where it cannot run."""
    if backend == "triton" and TRITON_INTERPRETED:
        return "cpu"
    has_gpu = torch.cuda.is_available()
    if backend == "cpu":
        assert _native.core is not None, _native.import_error
    if backend == "cuda" and has_gpu:
        assert _native.HAS_CUDA, "a GPU is here, but the native core has no CUDA kernels"
    if backend in ("cuda", "triton") and not has_gpu:
        pytest.skip(f"{backend}: no GPU on this machine")
    return "cuda" if has_gpu and backend != "cpu" else "cpu"


def gradients(output: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, list(inputs), grad.to(output))


def check_parity(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Forward and backward against the reference in float64, by the rule of tests/parity.py."""
    device = device_for(backend)
    if backend == "triton" and TRITON_INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("triton: its interpreter computes bfloat16 wrongly")
    inputs = case.inputs(dtype, device)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = case.run(exact_inputs, "eager")
    torch.manual_seed(1)
    grad = torch.randn(exact.shape, dtype=torch.float64).to(device=device, dtype=dtype)
    got, eager = case.run(inputs, backend), case.run(inputs, "eager")
    assert got.dtype == getattr(case, "output_dtype", lambda same: same)(dtype)
    assert_parity(got, eager, exact, "output")
    triples = zip(
        gradients(got, inputs, grad),
        gradients(eager, inputs, grad),
        gradients(exact, exact_inputs, grad),
        strict=True,
    )
    for i, (ours, same_dtype, exactly) in enumerate(triples):
        assert_parity(ours, same_dtype, exactly, f"gradient of input {i}", dtype)


def check_forward_parity(case: Case, backend: str, dtype: torch.dtype) -> None:
    """`check_parity` for an op whose kernels have no gradient."""
    device = device_for(backend)
    if backend == "triton" and TRITON_INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("triton: its interpreter computes bfloat16 wrongly")
    inputs = case.inputs(dtype, device)
    exact = case.run([x.double() for x in inputs], "eager")
    assert_parity(case.run(inputs, backend), case.run(inputs, "eager"), exact, "output")


def check_compile(function: Callable[..., Any], *args: Any, compiler: str = "aot_eager") -> None:
    """torch.compile(fullgraph=True) gives the same output and gradients, with one graph."""
    torch._dynamo.reset()
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    plain = function(*args)
    compiled = torch.compile(function, fullgraph=True, backend=compiler)(*args)
    torch.testing.assert_close(compiled, plain)
    if inputs:
        grad = torch.randn_like(plain)
        expected = gradients(plain, inputs, grad)
        torch.testing.assert_close(gradients(compiled, inputs, grad), expected)


def check_side_stream(case: Case, backend: str) -> None:
    """On a side stream the op waits for what is queued there: the stream is read on every call."""
    device = device_for(backend)
    if device != "cuda":
        pytest.skip(f"{backend}: streams are a GPU's")
    inputs = [x.detach() for x in case.inputs(torch.float32, device)]
    expected = case.run(inputs, backend)
    late = [torch.zeros_like(x) for x in inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, value in zip(late, inputs, strict=True):
            x.copy_(value)
        got = case.run(late, backend)
    stream.synchronize()
    assert torch.equal(got, expected)


def check_graph_capture(case: Case, backend: str) -> None:
    """Forward, and backward if it has one, inside a CUDA graph, replayed on new values."""
    device = device_for(backend)
    if device != "cuda":
        pytest.skip(f"{backend}: graphs are a GPU's")
    static = case.inputs(torch.float32, device)

    def step() -> tuple[Tensor, ...]:
        output = case.run(static, backend)
        leaves = [x for x in static if x.requires_grad]
        return (output, *(gradients(output, leaves, torch.ones_like(output)) if leaves else ()))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in static:
            x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
