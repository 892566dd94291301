"""What every benchmark sets up alike: the dtype and batches of the device, the compiled forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from benchmarks.rows import Function

GPU_BATCHES = (1, 64)


def parameters(cases: Mapping[str, tuple[Any, Sequence[int]]]) -> list[Any]:
    """pytest parameters (case, batch, dtype) from {title: (case, batches on a CPU)}.

    On a GPU bfloat16 and `GPU_BATCHES`, on a CPU float32.
    """
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    return [
        pytest.param(case, batch, dtype, id=f"{title} b{batch} {str(dtype)[6:]}")
        for title, (case, batches) in cases.items()
        for batch in (GPU_BATCHES if gpu else batches)
    ]


def compiled(functions: Mapping[str, Function]) -> dict[str, Function]:
    """Each compiled for its own shapes, with nothing left of what earlier cases compiled."""
    torch._dynamo.reset()
    return {name: torch.compile(f, dynamic=False) for name, f in functions.items()}
