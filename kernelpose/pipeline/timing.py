"""Medians of calls that take turns, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    min_rounds: int = 3,
    budget_s: float = 25.0,
) -> dict[str, float]:
    """Median milliseconds of each call, after one warm-up of each.

    All calls run once a round. After ``min_rounds`` no new round starts past ``budget_s``.
    """
    for call in calls.values():
        _milliseconds(call)
    taken: dict[str, list[float]] = {label: [] for label in calls}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= min_rounds and time.perf_counter() - start > budget_s:
            break
        for label, call in calls.items():
            taken[label].append(_milliseconds(call))
    return {label: statistics.median(times) for label, times in taken.items()}


def _milliseconds(call: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return (time.perf_counter() - start) * 1e3


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
