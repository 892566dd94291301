"""Timing contenders fairly: interleaved, warm, many samples, medians."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kernelpose.pipeline.timing import Sampler, interleaved

SAMPLE_SECONDS = 2e-3  # a sample repeats a quick function until it takes about so long
SECONDS = {"cpu": 0.8, "cuda": 0.3}  # spent on each contender
MIN_SAMPLES, MAX_SAMPLES = 15, 400
MAX_CALLS = 256  # in one CUDA graph

Calls = Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Times:
    """Seconds a call, from samples that were taken in turns with the other contenders'."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, q: float) -> float:
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def time_all(functions: Mapping[str, Calls], device: torch.device) -> dict[str, Times]:
    """Time every contender, in turns with the others, until each had its share.

    A contender is a sequence of functions that do the same on different memory; they take turns, so
    that no call finds its inputs in the last cache. On a GPU one sample is one replay of a CUDA
    graph of them, between two events.
    """
    sampler_of = _gpu_sampler if device.type == "cuda" else _cpu_sampler
    taken = interleaved(
        {name: sampler_of(calls) for name, calls in functions.items()},
        budget_s=SECONDS[device.type] * len(functions),
        min_rounds=MIN_SAMPLES,
        max_rounds=MAX_SAMPLES,
    )
    return {name: Times(tuple(samples)) for name, samples in taken.items()}


def _cpu_sampler(calls: Calls) -> Sampler:
    for call in calls:  # warm up: compilation, allocation, page faults
        call()
    start = time.perf_counter()
    for call in calls:
        call()
    once = (time.perf_counter() - start) / len(calls)
    rounds = max(1, round(SAMPLE_SECONDS / once / len(calls)))

    def sample() -> float:
        for call in calls:  # untimed: the caches hold what other contenders left there
            call()
        start = time.perf_counter()
        for _ in range(rounds):
            for call in calls:
                call()
        return (time.perf_counter() - start) / rounds / len(calls)

    return sample


@functools.cache
def gpu_stream() -> torch.cuda.Stream:
    """The stream that is timed. What is replayed here was also set up here: a backward pass runs on
    the stream of its forward pass."""
    return torch.cuda.Stream()


def _gpu_sampler(calls: Calls) -> Sampler:
    stream = gpu_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, *calls):
            call()
    stream.synchronize()
    passes, graph = 1, _captured(calls)
    # More calls take no more memory: what one leaves behind is freed in the graph's own pool, where
    # the next finds it.
    while _replay_seconds(graph) < SAMPLE_SECONDS and 2 * passes * len(calls) <= MAX_CALLS:
        passes *= 2
        del graph  # its pool goes before there is another
        graph = _captured([*calls] * passes)
    return lambda: _replay_seconds(graph) / passes / len(calls)


def _captured(calls: Calls) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=gpu_stream()):
        for call in calls:
            call()
    return graph


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # While the first replay runs, the host submits the second: between its events lies no waiting
    # for the host. And the second finds the L2 cache as its own last calls leave it.
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
