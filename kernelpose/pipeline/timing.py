"""Samples that contenders take in turns, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Mapping

import torch

Sampler = Callable[[], float]


def interleaved(
    samplers: Mapping[str, Sampler], *, budget_s: float, min_rounds: int, max_rounds: int
) -> dict[str, list[float]]:
    """What each sampler returned: one sample of each a round, in a random order.

    After ``min_rounds`` no new round starts past ``budget_s`` seconds.
    """
    taken: dict[str, list[float]] = {name: [] for name in samplers}
    order, shuffle = list(samplers), random.Random(0).shuffle
    start = time.perf_counter()
    for number in range(max_rounds):
        if number >= min_rounds and time.perf_counter() - start > budget_s:
            break
        shuffle(order)
        for name in order:
            taken[name].append(samplers[name]())
    return taken


def wall_clock(call: Callable[[], object]) -> Sampler:
    """Warms a call up; returns a sampler of its seconds, the GPU's work included."""
    finished = synchronized(call)
    finished()

    def sample() -> float:
        start = time.perf_counter()
        finished()
        return time.perf_counter() - start

    return sample


def synchronized(call: Callable[[], object]) -> Callable[[], None]:
    """A call that returns only when the GPU, if there is one, has done its part."""

    def run() -> None:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def machine(device: torch.device) -> str:
    """What the figures were taken on, in a few words."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"
    return f"{name}, float32, torch {torch.__version__}"
