"""window_attention on the shapes of ViTPose and MobileViT, against the best PyTorch has."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.attention import Case
from benchmarks.report import Report
from benchmarks.rows import Function, Row, fit_l2, rotate, time_backward, time_forward
from benchmarks.setup import compiled, parameters
from benchmarks.timing import Times
from kernelpose.backend import BACKENDS, choose, why_not
from kernelpose.pipeline.timing import synchronized
from tests.parity import assert_parity

CASES = {
    "vitpose-s shifted 8x8": (Case((32, 24), 384, 12, (8, 8), (4, 4)), (1,)),
    "vitpose-b shifted 8x8": (Case((32, 24), 768, 12, (8, 8), (4, 4)), (1, 8)),
    "vitpose-s window 8x8": (Case((32, 24), 384, 12, (8, 8)), (1,)),
    "vitpose-b window 8x8": (Case((32, 24), 768, 12, (8, 8)), (1, 8)),
    "mobilevit grid 32x24": (Case((32, 24), 32, 1, (2, 2), partition="grid"), (1, 8)),
    "mobilevit grid 16x12": (Case((16, 12), 32, 1, (2, 2), partition="grid"), (1, 8)),
    "mobilevit grid 8x6": (Case((8, 6), 32, 1, (2, 2), partition="grid"), (1, 8)),
    "vitpose-s full 192": (Case((16, 12), 384, 12), (1,)),
    "vitpose-b full 192": (Case((16, 12), 768, 12), (1, 8)),
    "vitpose-h full 192": (Case((16, 12), 1280, 16), (1,)),
    "vitpose-b full 768": (Case((32, 24), 768, 12), (1,)),
}


@pytest.mark.parametrize(("case", "batch", "dtype"), parameters(CASES))
def bench_window_attention(
    case: Case,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compiles: bool,
    record: Callable[[Row], None],
    benchmark: Any,
    request: pytest.FixtureRequest,
) -> None:
    def inputs() -> list[Tensor]:
        shape = (batch, *case.size, 3 * case.channels)
        return [torch.randn(shape, device=device, dtype=dtype).requires_grad_()]

    torch.manual_seed(0)
    sets = rotate(inputs, device)
    args, options = case.arguments(sets[0][0].detach())
    chosen = choose("window_attention", None, *args, **options)
    ours = [
        name
        for name in BACKENDS
        if name not in ("eager", "torch")
        and not why_not("window_attention", name, *args, **options)
    ]
    contenders: dict[str, Function] = {name: case.ours(name) for name in ours}
    if chosen not in contenders:
        contenders[chosen] = case.ours(chosen)
    _check_parity(case, contenders, sets[0][0])
    contenders |= {"eager": case.eager, "sdpa": case.peer(device, dtype)}
    if compiles:
        contenders |= compiled({"compile": case.eager, "compile sdpa": case.peer(device, dtype)})
    title, mine = request.node.callspec.id, tuple({*ours, chosen})
    for direction in ("forward", "backward"):
        backward = direction == "backward"
        times = (time_backward if backward else time_forward)(contenders, sets, device)
        least = case.least(batch, backward, dtype.itemsize)
        row = Row(
            "window_attention", title, direction, str(dtype)[6:], times, mine, chosen, *least,
            inputs_in_l2=fit_l2(sets, device),
        )  # fmt: skip
        record(row)
    call = functools.partial(contenders[chosen], sets[0][0].detach())
    with torch.no_grad():
        benchmark(synchronized(call))


def _check_parity(case: Case, contenders: dict[str, Function], qkv: Tensor) -> None:
    """No speed is printed for a wrong result."""
    wide = qkv.detach()[:2].double().requires_grad_()
    narrow = qkv.detach()[:2].requires_grad_()
    exact, eager = case.eager(wide), case.eager(narrow)
    grad = torch.randn_like(eager)
    exact_grad = torch.autograd.grad(exact, wide, grad.double())[0]
    eager_grad = torch.autograd.grad(eager, narrow, grad)[0]
    for name, run in contenders.items():
        output = run(narrow)
        assert_parity(output, eager, exact, f"{name} forward")
        got = torch.autograd.grad(output, narrow, grad)[0]
        assert_parity(got, eager_grad, exact_grad, f"{name} backward")


def bench_interleaved_with_torch_ops(device: torch.device, report: Report) -> None:
    """Our op between torch's own on two threads: no outliers from threads in each other's way."""
    if device.type != "cpu":
        pytest.skip("a matter of CPU threads")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    qkv, x, w = torch.randn(1, 32, 24, 1152), torch.randn(768, 384), torch.randn(384, 1152)
    ours = CASES["vitpose-s shifted 8x8"][0].ours("cpu")
    samples: dict[str, list[float]] = {"window_attention": [], "torch matmul": []}
    for _ in range(1000):
        for name, run in (("torch matmul", lambda: x @ w), ("window_attention", lambda: ours(qkv))):
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    spread = {}
    for name, taken in samples.items():
        times = Times(tuple(taken[20:]))
        spread[name] = round(times.quantile(0.99) / times.median, 2)
    report.notes["p99 over median, ops in turns on 2 threads"] = spread
    if spread["torch matmul"] >= 2:
        pytest.skip(f"the machine was busy: torch's own matmul had {spread['torch matmul']}")
    assert spread["window_attention"] < 2
