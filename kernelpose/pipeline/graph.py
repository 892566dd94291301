"""Replaying a function of GPU tensors from CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UPS = 3  # before a capture: libraries choose algorithms and allocate in their first calls

Function = Callable[..., tuple[Tensor, ...]]


class Graphed:
    """`function`, captured once for each shape of its inputs and replayed from then on.

    At batch 1 a model's time is that of its launches, and a graph has one. The function must read
    nothing but its inputs and tensors that stay where they are, and must not synchronise.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._captured: dict[
            tuple[torch.Size, ...],
            tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], tuple[Tensor, ...]],
        ] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._captured:
            self._captured[shapes] = self._capture(inputs)
        graph, static, outputs = self._captured[shapes]
        for tensor, value in zip(static, inputs, strict=True):
            tensor.copy_(value)
        graph.replay()
        return tuple(tensor.clone() for tensor in outputs)

    def _capture(
        self, inputs: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], tuple[Tensor, ...]]:
        static = tuple(tensor.clone() for tensor in inputs)
        with torch.cuda.device(static[0].device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    self._function(*static)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = self._function(*static)
        return graph, static, outputs
