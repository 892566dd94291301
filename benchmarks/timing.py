"""Timing contenders fairly: interleaved, warm, many samples, medians."""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

SAMPLE_SECONDS = 2e-3  # a sample repeats a quick function until it takes about so long
SECONDS = {"cpu": 0.8, "cuda": 0.3}  # spent on each contender
MIN_SAMPLES, MAX_SAMPLES = 15, 400


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


def interleaved(
    functions: Mapping[str, Sequence[Callable[[], object]]], device: torch.device
) -> dict[str, Times]:
    """Time every contender, one sample of each in a random order, until each had its share.

    A contender is a sequence of functions that do the same on different memory; they take turns, so
    that no call finds its inputs in the last cache. On a GPU one sample is one replay of a CUDA
    graph of all of them, between two events.
    """
    sample_of = _gpu_sampler if device.type == "cuda" else _cpu_sampler
    samplers = {name: sample_of(calls) for name, calls in functions.items()}
    first = {name: sampler() for name, sampler in samplers.items()}
    slowest = max(first.values())
    count = int(
        min(MAX_SAMPLES, max(MIN_SAMPLES, SECONDS[device.type] / max(slowest, SAMPLE_SECONDS)))
    )
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(samplers), random.Random(0).shuffle
    for _ in range(count):
        shuffle(order)
        for name in order:
            samples[name].append(samplers[name]())
    return {name: Times(tuple(values)) for name, values in samples.items()}


def _cpu_sampler(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    for call in calls:  # warm up: compilation, allocation, page faults
        call()
    start = time.perf_counter()
    for call in calls:
        call()
    once = (time.perf_counter() - start) / len(calls)
    rounds = max(1, round(SAMPLE_SECONDS / once / len(calls)))

    def sample() -> float:
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


def _gpu_sampler(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    stream = gpu_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, *calls):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()

    def sample() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)

    return sample
