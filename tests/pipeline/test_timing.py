"""Samples in turns, within a budget, and with the GPU's work in them."""

from __future__ import annotations

import time

import pytest
import torch

from kernelpose.pipeline.timing import interleaved, synchronized, wall_clock


def test_samplers_take_turns_in_changing_order() -> None:
    order: list[str] = []

    def sampler(name: str, value: float):
        return lambda: (order.append(name), value)[1]

    taken = interleaved(
        {"a": sampler("a", 1.0), "b": sampler("b", 2.0)}, budget_s=60, min_rounds=1, max_rounds=20
    )
    assert taken == {"a": [1.0] * 20, "b": [2.0] * 20}
    rounds = {tuple(order[i : i + 2]) for i in range(0, 40, 2)}
    assert rounds == {("a", "b"), ("b", "a")}


@pytest.mark.parametrize(("min_rounds", "expected"), [(2, 4), (6, 6)])
def test_no_round_starts_past_the_budget(
    monkeypatch: pytest.MonkeyPatch, min_rounds: int, expected: int
) -> None:
    clock = 0.0

    def sampler() -> float:
        nonlocal clock
        clock += 1.0
        return 1.0

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    taken = interleaved({"a": sampler}, budget_s=3.5, min_rounds=min_rounds, max_rounds=9)
    assert len(taken["a"]) == expected
    assert len(interleaved({"a": sampler}, budget_s=99, min_rounds=1, max_rounds=9)["a"]) == 9


def test_a_sample_is_one_call_after_a_warm_up() -> None:
    calls: list[int] = []
    sample = wall_clock(lambda: (calls.append(1), time.sleep(0.01)))
    assert len(calls) == 1
    assert sample() >= 0.01
    assert len(calls) == 2


def test_the_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    synchronized(lambda: events.append("call"))()
    assert events == ["call", "synchronize"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    synchronized(lambda: events.append("call"))()
    assert events == ["call", "synchronize", "call"]
