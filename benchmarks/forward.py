"""An op without gradient against eager, compiled eager and the plain path on the host, if any."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.rows import Function, Row, fit_l2, rotate, time_forward
from benchmarks.setup import compiled
from kernelpose import ops
from kernelpose.backend import BACKENDS, choose, why_not
from kernelpose.pipeline.timing import synchronized

Compare = Callable[..., None]
_same_bits = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture
def compare(
    device: torch.device,
    compiles: bool,
    record: Callable[[Row], None],
    benchmark: Any,
    request: pytest.FixtureRequest,
) -> Compare:
    """compare(op, inputs, options, plain=None, bytes=None, same=bit for bit): times one case.

    op: its name; called as op(*inputs(), **options, backend=...). inputs: makes a fresh list of
    tensors. plain: the same in numpy, SciPy and OpenCV, tensors in and out, timed on a CPU only.
    bytes: the least that the op moves. same(result, eager's) raises where they differ.
    """

    def run(
        op: str,
        inputs: Callable[[], list[Tensor]],
        options: Mapping[str, Any],
        plain: Function | None = None,
        bytes: int | None = None,
        same: Callable[[Any, Any], None] = _same_bits,
    ) -> None:
        torch.manual_seed(0)
        sets = rotate(inputs, device)
        chosen = choose(op, None, *sets[0], **options)
        names = [b for b in BACKENDS if b == "eager" or not why_not(op, b, *sets[0], **options)]
        contenders: dict[str, Function] = {
            name: functools.partial(getattr(ops, op), **options, backend=name) for name in names
        }
        if device.type == "cpu" and plain is not None:
            contenders["plain"] = plain
        eager = contenders["eager"]
        expected = eager(*sets[0])
        for function in contenders.values():  # no speed is printed for a wrong result
            same(function(*sets[0]), expected)
        if compiles:
            contenders |= compiled({"compile": eager})
        dtype = str(options.get("dtype", sets[0][0].dtype)).removeprefix("torch.")
        row = Row(
            op, request.node.callspec.id, "forward", dtype,
            time_forward(contenders, sets, device),
            tuple(n for n in names if n != "eager"), chosen,
            bytes=bytes, inputs_in_l2=fit_l2(sets, device),
        )  # fmt: skip
        record(row)
        benchmark(synchronized(functools.partial(contenders[chosen], *sets[0])))

    return run
