"""One row of a benchmark: parity first, then the times of all contenders, then a verdict."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import MAX_CALLS, Times, gpu_stream, time_all

Function = Callable[..., Any]  # gives a tensor or several


@dataclass(frozen=True)
class Row:
    """What was measured for one case in one direction.

    times: by contender. ours: names of the contenders that are kernelpose's. chosen: the one that
    automatic choice takes. bytes, flops: the least that the work takes; None where nobody counted.
    inputs_in_l2: see `fit_l2`.
    """

    op: str
    case: str
    direction: str
    dtype: str
    times: Mapping[str, Times]
    ours: tuple[str, ...]
    chosen: str
    bytes: int | None = None
    flops: int | None = None
    inputs_in_l2: bool | None = None

    @property
    def best_other(self) -> str:
        return min(
            (n for n in self.times if n not in self.ours), key=lambda n: self.times[n].median
        )

    @property
    def ratio(self) -> float:
        """How many times faster the chosen contender is than the best that is not ours."""
        return self.times[self.best_other].median / self.times[self.chosen].median

    def as_json(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "case": self.case,
            "direction": self.direction,
            "dtype": self.dtype,
            "milliseconds": {n: round(t.median * 1e3, 5) for n, t in self.times.items()},
            "milliseconds_p99": {
                n: round(t.quantile(0.99) * 1e3, 5) for n, t in self.times.items()
            },
            "samples": min(len(t.samples) for t in self.times.values()),
            "ours": list(self.ours),
            "chosen": self.chosen,
            "best_other": self.best_other,
            "ratio": round(self.ratio, 3),
            "bytes": self.bytes,
            "flops": self.flops,
            "inputs_in_l2": self.inputs_in_l2,
        }


def rotate(make_inputs: Callable[[], list[Tensor]], device: torch.device) -> list[list[Tensor]]:
    """As many fresh input sets as it takes to outgrow the L2 cache of a GPU; one on a CPU.

    But no more than `MAX_CALLS`, which is too few for the smallest inputs: see `fit_l2`.
    """
    sets = [make_inputs()]
    if device.type == "cuda":
        more = 2 * _l2_bytes(device) // _bytes(sets)
        sets += [make_inputs() for _ in range(min(MAX_CALLS - 1, more))]
    return sets


def fit_l2(sets: Sequence[Sequence[Tensor]], device: torch.device) -> bool | None:
    """Whether a GPU's L2 cache can hold all input sets, so that reading them costs no memory's
    time; None on a CPU."""
    return _bytes(sets) <= _l2_bytes(device) if device.type == "cuda" else None


def _bytes(sets: Sequence[Sequence[Tensor]]) -> int:
    return sum(tensor.nbytes for tensors in sets for tensor in tensors)


def _l2_bytes(device: torch.device) -> int:
    size: int = torch.cuda.get_device_properties(device).L2_cache_size
    return size


def time_forward(
    contenders: Mapping[str, Function], inputs: Sequence[Sequence[Tensor]], device: torch.device
) -> dict[str, Times]:
    detached = [[t.detach() for t in tensors] for tensors in inputs]

    def calls(function: Function) -> list[Callable[[], object]]:
        return [functools.partial(function, *tensors) for tensors in detached]

    with torch.no_grad():
        return time_all({n: calls(f) for n, f in contenders.items()}, device)


def results(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a function returns, be it one tensor or several."""
    return output if isinstance(output, tuple) else (output,)


def time_backward(
    contenders: Mapping[str, Function], inputs: Sequence[Sequence[Tensor]], device: torch.device
) -> dict[str, Times]:
    """The backward pass alone: the graph of one forward pass, walked again and again."""
    stream = gpu_stream() if device.type == "cuda" else None

    def calls(function: Function) -> list[Callable[[], object]]:
        made: list[Callable[[], object]] = []
        for tensors in inputs:
            with torch.cuda.stream(stream):
                outputs = results(function(*tensors))
                grads = [torch.randn_like(output) for output in outputs]
            walk = functools.partial(
                torch.autograd.grad, outputs, tensors, grads, retain_graph=True
            )
            made.append(walk)
        return made

    return time_all({n: calls(f) for n, f in contenders.items()}, device)
