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

    @property
    def op(self) -> str:
        """Its name."""

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
        drawn: dict[torch.dtype, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        for backend, dtypes in spec.dtypes.items():
            for dtype in dtypes if backend != "eager" else ():
                if dtype not in drawn:
                    drawn[dtype] = case.arguments(case.inputs(dtype, "meta"))
                args, options = drawn[dtype]
                if spec.objection(backend, *args, **options):
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


def check_memory_formats(case: Case, backend: str) -> None:
    """Maps (B, C, H, W), the first inputs, in any layout: the same numbers, dense ones in their
    own format, gradients included, whatever the format of the gradient that comes."""
    inputs = case.inputs(torch.float32, device_for(backend))
    maps = [x.ndim == 4 for x in inputs]

    def run(layout: Callable[[Tensor], Tensor], grad: Tensor | None = None) -> list[Tensor]:
        leaves = [
            layout(x.detach()) if m else x.detach() for x, m in zip(inputs, maps, strict=True)
        ]
        leaves = [x.requires_grad_() for x in leaves]
        output = case.run(leaves, backend)
        grad = torch.ones((), device=output.device).expand_as(output) if grad is None else grad
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    def channels_last(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    def wide(x: Tensor) -> Tensor:  # tokens after one that is no part of the map
        tokens = torch.nn.functional.pad(x.flatten(2).transpose(1, 2), (0, 0, 1, 0))
        return tokens[:, 1:].transpose(1, 2).unflatten(2, x.shape[2:])

    expected = run(Tensor.contiguous)
    assert all(x.is_contiguous() for x, m in zip(expected, [True, *maps], strict=True) if m)
    for layout in (channels_last, wide):
        got = run(layout)
        for x, y, m in zip(got, expected, [True, *maps], strict=True):
            torch.testing.assert_close(x, y)
            assert not m or x.is_contiguous(memory_format=torch.channels_last)
        torch.manual_seed(1)
        grad = torch.randn_like(expected[0])
        for x, y in zip(run(layout, grad), run(layout, channels_last(grad)), strict=True):
            assert torch.equal(x, y)


def check_inputs_kept(case: Case, backend: str, *, exact: bool = True) -> None:
    """Inputs that start in the middle of a vector give what others give, and are not written."""
    inputs = case.inputs(torch.float32, device_for(backend))
    moved = []
    for x in inputs:
        memory = torch.full((x.numel() + 1,), torch.nan, device=x.device)
        view = memory.as_strided(x.shape, x.stride(), 1).copy_(x.detach())
        moved.append(view.requires_grad_())
    copies = [x.detach().clone() for x in moved]
    output, expected = case.run(moved, backend), case.run(inputs, backend)
    grad = torch.ones_like(output)
    pairs = zip(
        (output, *gradients(output, moved, grad)),
        (expected, *gradients(expected, inputs, grad)),
        strict=True,
    )
    tolerance = 0 if exact else None
    for ours, same in pairs:
        torch.testing.assert_close(ours, same, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(*pair) for pair in zip(moved, copies, strict=True))


def check_autocast_leaves_alone(case: Case, backend: str) -> None:
    """Under autocast the op computes what it is given, as eager does."""
    device = device_for(backend)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = case.inputs(dtype, device)
        expected = case.run(inputs, backend)
        with torch.autocast(device, torch.bfloat16):
            got, eager = case.run(inputs, backend), case.run(inputs, "eager")
        assert got.dtype == eager.dtype == dtype and torch.equal(got, expected)


def check_around_dispatcher(case: Case, backend: str) -> None:
    """In inference mode, straight to the backend: what the registered op gives, bit for bit."""
    inputs = case.inputs(torch.float32, device_for(backend))
    registered = case.run(inputs, backend)
    assert registered.grad_fn is not None
    with torch.inference_mode():
        direct = case.run([x.detach() for x in inputs], backend)
    assert torch.equal(direct, registered) and direct.stride() == registered.stride()


def check_deterministic(case: Case, backend: str) -> None:
    """The same bits on every call, gradients included, whatever the number of threads."""
    inputs = case.inputs(torch.float32, device_for(backend))
    before = torch.get_num_threads()
    results: list[tuple[Tensor, ...]] = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            output = case.run(inputs, backend)
            results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


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
