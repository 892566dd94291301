"""What the benchmarks decide on a GPU, on a pretended one: samples, graphs, rotation, waiting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import rows, timing
from benchmarks.timing import MAX_CALLS, SAMPLE_SECONDS

GPU = torch.device("cuda", 0)
LAUNCH = 20e-6  # what the host takes to submit a graph


class PretendedGpu:
    """A clock that calls advance; a graph replays what was called while it was captured."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.graphs: list[Any] = []
        self._captured: list[Callable[[], object]] | None = None

    def call(self, seconds: float) -> None:
        if self._captured is None:
            self.device = max(self.device, self.host) + seconds
        else:
            self._captured.append(lambda: self.call(seconds))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = self

        class Graph:
            def __init__(self) -> None:
                self.calls: list[Callable[[], object]] = []
                gpu.graphs.append(self)

            def replay(self) -> None:
                gpu.host += LAUNCH
                for call in self.calls:
                    call()

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(gpu.device, gpu.host)

            def synchronize(self) -> None:
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) * 1e3

        @contextlib.contextmanager
        def capture(graph: Graph, stream: object):
            self._captured = graph.calls
            yield
            self._captured = None

        stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
        timing.gpu_stream.cache_clear()
        monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.cuda, "Event", Event)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    made = PretendedGpu()
    made.install(monkeypatch)
    yield made
    timing.gpu_stream.cache_clear()


@pytest.mark.parametrize(
    ("seconds", "sets", "calls"),
    [
        (1.1e-3, 1, 2),  # a large batch, whose inputs alone outgrow the cache
        (90e-6, 1, 32),
        (2e-6, 64, MAX_CALLS),
        (5e-6, MAX_CALLS, MAX_CALLS),
        (5e-6, 100, 200),
        (1.0, 3, 3),
    ],
)
def test_a_graph_holds_enough_calls_for_a_sample(
    gpu: PretendedGpu, seconds: float, sets: int, calls: int
) -> None:
    times = timing.time_all({"a": [lambda: gpu.call(seconds)] * sets}, GPU)["a"]
    kept = gpu.graphs[-1]
    assert len(kept.calls) == calls
    assert len(kept.calls) * seconds >= SAMPLE_SECONDS or 2 * calls > MAX_CALLS
    # Neither the launch nor how many calls there are shows in the time of one.
    assert times.median == pytest.approx(seconds)


def test_contenders_share_the_time(gpu: PretendedGpu) -> None:
    times = timing.time_all(
        {"slow": [lambda: gpu.call(0.01)], "quick": [lambda: gpu.call(1e-5)]}, GPU
    )
    assert len(times["slow"].samples) == len(times["quick"].samples) >= timing.MIN_SAMPLES
    assert times["slow"].median == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("elements", "sets", "cached"),
    [(40_000_000, 1, False), (10_000_000, 3, False), (100_000, 251, False), (10_000, 256, True)],
)
def test_inputs_rotate_through_more_than_the_l2_cache(
    monkeypatch: pytest.MonkeyPatch, elements: int, sets: int, cached: bool
) -> None:
    properties = SimpleNamespace(L2_cache_size=50_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    made = rows.rotate(lambda: [torch.empty(elements, device="meta")], GPU)
    assert len(made) == sets
    assert rows.fit_l2(made, GPU) is cached
    total = sets * elements * 4
    assert total > 2 * properties.L2_cache_size or sets == MAX_CALLS


def test_a_cpu_rotates_nothing() -> None:
    cpu = torch.device("cpu")
    made = rows.rotate(lambda: [torch.empty(3)], cpu)
    assert len(made) == 1
    assert rows.fit_l2(made, cpu) is None


def test_a_quick_call_is_repeated_for_a_sample_on_a_cpu() -> None:
    calls: list[int] = []
    times = timing.time_all({"a": [lambda: calls.append(1)]}, torch.device("cpu"))["a"]
    assert len(calls) > 100 * len(times.samples)
    assert times.median < 1e-4
