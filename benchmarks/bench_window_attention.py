"""window_attention on the shapes of ViTPose and MobileViT, against the best PyTorch has."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from benchmarks.attention import Case
from benchmarks.both_ways import CompareBothWays
from benchmarks.report import Report
from benchmarks.setup import parameters
from benchmarks.timing import Times

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
    compare_both_ways: CompareBothWays,
) -> None:
    def inputs() -> list[Tensor]:
        return [torch.randn(batch, *case.size, 3 * case.channels, device=device, dtype=dtype)]

    compare_both_ways(
        "window_attention",
        inputs,
        case.arguments(inputs()[0])[1],
        lambda backward: case.least(batch, backward, dtype.itemsize),
        {"sdpa": case.peer(device, dtype)},
    )


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
