"""window_attention on the shapes of ViTPose and MobileViT, against the best PyTorch has."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import Report
from benchmarks.rows import Function, Row, rotate, time_backward, time_forward
from benchmarks.timing import Times
from kernelpose.backend import BACKENDS, choose, why_not
from kernelpose.ops import window_attention
from kernelpose.reference import window_attention as reference_module
from tests.parity import assert_parity

Pair = tuple[int, int]


@dataclass(frozen=True)
class Case:
    size: Pair
    channels: int
    heads: int
    window: Pair | None = None
    shift: Pair = (0, 0)
    partition: str = "window"
    batches: tuple[int, ...] = (1,)

    def arguments(self, qkv: Tensor) -> tuple[tuple[Tensor], dict[str, Any]]:
        return (qkv,), {
            "num_heads": self.heads,
            "window": self.window,
            "shift": self.shift,
            "partition": self.partition,
        }

    def ours(self, backend: str) -> Function:
        def run(qkv: Tensor) -> Tensor:
            args, options = self.arguments(qkv)
            return window_attention(*args, **options, backend=backend)

        return run

    def peer(self, device: torch.device, dtype: torch.dtype) -> Function:
        """What a careful user writes: roll, partition, SDPA with a mask made once, and back."""
        window = self.window or self.size
        geometry = (self.size, window, self.shift, self.partition)
        mask = None
        if any(self.shift):
            ids = reference_module._region_ids(*geometry, device)
            visible = ids[:, :, None] == ids[:, None, :]
            mask = torch.zeros(visible.shape, device=device, dtype=dtype)
            mask = mask.masked_fill(~visible, -torch.inf)[:, None]

        def run(qkv: Tensor) -> Tensor:
            groups = reference_module._partition(qkv, *geometry[1:])
            q, k, v = (
                groups.unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5).flatten(1, 2)
            )
            repeated = None if mask is None else mask.repeat(qkv.shape[0], 1, 1, 1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=repeated)
            out = out.transpose(1, 2).flatten(2).unflatten(0, (qkv.shape[0], -1))
            return reference_module._merge(out, *geometry)

        return run

    def eager(self, qkv: Tensor) -> Tensor:
        return self.ours("eager")(qkv)

    def attended_pairs(self) -> int:
        """Pairs of tokens that see each other, in one image and head."""
        total = 1
        window = self.window or self.size
        for size, edge, shift in zip(self.size, window, self.shift, strict=True):
            if self.partition == "grid":
                counts = [len(range(r, size, edge)) for r in range(min(edge, size))]
            else:
                starts = [0, *range(shift, size, edge)] if shift else list(range(0, size, edge))
                counts = [b - a for a, b in zip(starts, [*starts[1:], size], strict=True)]
            total *= sum(c * c for c in counts)
        return total

    def least(self, batch: int, backward: bool, element_size: int) -> tuple[int, int]:
        """(bytes, FLOPs): every tensor once; 2 products forward, 5 backward."""
        elements = batch * self.size[0] * self.size[1] * self.channels * (8 if backward else 4)
        products = 5 if backward else 2
        flops = 2 * products * batch * self.attended_pairs() * self.channels
        return elements * element_size, flops


CASES = {
    "vitpose-s shifted 8x8": Case((32, 24), 384, 12, (8, 8), (4, 4)),
    "vitpose-b shifted 8x8": Case((32, 24), 768, 12, (8, 8), (4, 4), batches=(1, 8)),
    "vitpose-s window 8x8": Case((32, 24), 384, 12, (8, 8)),
    "vitpose-b window 8x8": Case((32, 24), 768, 12, (8, 8), batches=(1, 8)),
    "mobilevit grid 32x24": Case((32, 24), 32, 1, (2, 2), partition="grid", batches=(1, 8)),
    "mobilevit grid 16x12": Case((16, 12), 32, 1, (2, 2), partition="grid", batches=(1, 8)),
    "mobilevit grid 8x6": Case((8, 6), 32, 1, (2, 2), partition="grid", batches=(1, 8)),
    "vitpose-s full 192": Case((16, 12), 384, 12),
    "vitpose-b full 192": Case((16, 12), 768, 12, batches=(1, 8)),
    "vitpose-h full 192": Case((16, 12), 1280, 16),
    "vitpose-b full 768": Case((32, 24), 768, 12),
}
GPU_BATCHES = (1, 64)


def _parameters() -> list[Any]:
    gpu = torch.cuda.is_available()
    return [
        pytest.param(case, batch, dtype, id=f"{name} b{batch} {str(dtype)[6:]}")
        for name, case in CASES.items()
        for batch in (GPU_BATCHES if gpu else case.batches)
        for dtype in ((torch.bfloat16,) if gpu else (torch.float32,))
    ]


@pytest.mark.parametrize(("case", "batch", "dtype"), _parameters())
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
        torch._dynamo.reset()
        contenders["compile"] = torch.compile(case.eager, dynamic=False)
        contenders["compile sdpa"] = torch.compile(case.peer(device, dtype), dynamic=False)
    name = request.node.callspec.id
    for direction in ("forward", "backward"):
        backward = direction == "backward"
        times = (time_backward if backward else time_forward)(contenders, sets, device)
        least = case.least(batch, backward, dtype.itemsize)
        mine = tuple({*ours, chosen})
        row = Row("window_attention", name, direction, str(dtype)[6:], times, mine, chosen, *least)
        record(row)
    with torch.no_grad():
        benchmark(contenders[chosen], sets[0][0].detach())


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
    ours = CASES["vitpose-s shifted 8x8"].ours("cpu")
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
