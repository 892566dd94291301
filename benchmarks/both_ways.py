"""An op with gradient against eager, compiled eager and its peers, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.rows import Function, Row, fit_l2, results, rotate, time_backward, time_forward
from benchmarks.setup import compiled
from kernelpose import ops
from kernelpose.backend import BACKENDS, choose, why_not
from kernelpose.pipeline.timing import synchronized
from tests.parity import assert_parity

CompareBothWays = Callable[..., None]


@pytest.fixture
def compare_both_ways(
    device: torch.device,
    compiles: bool,
    record: Callable[[Row], None],
    benchmark: Any,
    request: pytest.FixtureRequest,
) -> CompareBothWays:
    """compare_both_ways(op, inputs, options, least, ...): times one case in both directions.

    op: its name; called as op(*inputs(), **options, backend=...). inputs: makes a fresh list of
    tensors, the main one first, which all have a gradient. least(backward) gives (bytes, FLOPs or
    None), the least that a direction takes. peers: what others would call with the same tensors;
    plain_peers: the same, where torch.compile takes minutes. arrange(*tensors): the op's arguments,
    where they are not the tensors themselves.
    """

    def run(
        op: str,
        inputs: Callable[[], list[Tensor]],
        options: Mapping[str, Any],
        least: Callable[[bool], tuple[int, int | None]],
        peers: Mapping[str, Function] | None = None,
        plain_peers: Mapping[str, Function] | None = None,
        arrange: Callable[..., tuple[Any, ...]] = lambda *tensors: tensors,
    ) -> None:
        torch.manual_seed(0)
        sets = rotate(lambda: [x.requires_grad_() for x in inputs()], device)
        plain = [x.detach() for x in sets[0]]
        chosen = choose(op, None, *arrange(*plain), **options)
        names = [b for b in BACKENDS if b not in ("eager", "torch")]
        ours = {b for b in names if not why_not(op, b, *arrange(*plain), **options)} | {chosen}

        def call(*tensors: Tensor, backend: str) -> Any:
            return getattr(ops, op)(*arrange(*tensors), **options, backend=backend)

        functions: dict[str, Function] = {
            name: functools.partial(call, backend=name) for name in sorted(ours | {"eager"})
        }
        _check_parity(functions, plain)
        others = {"eager": functions["eager"], **(peers or {})}
        contenders = functions | others | dict(plain_peers or {})
        if compiles:
            titles = ("compile" if n == "eager" else f"compile {n}" for n in others)
            contenders |= compiled(dict(zip(titles, others.values(), strict=True)))
        title, dtype = request.node.callspec.id, str(plain[0].dtype).removeprefix("torch.")
        for direction, timer in (("forward", time_forward), ("backward", time_backward)):
            row = Row(
                op, title, direction, dtype, timer(contenders, sets, device),
                tuple(ours - {"eager"}), chosen, *least(direction == "backward"),
                inputs_in_l2=fit_l2(sets, device),
            )  # fmt: skip
            record(row)
        with torch.no_grad():
            benchmark(synchronized(functools.partial(contenders[chosen], *plain)))

    return run


def _check_parity(functions: Mapping[str, Function], inputs: list[Tensor]) -> None:
    """No speed is printed for a wrong result."""

    def both(
        function: Function, tensors: list[Tensor], grads: list[Tensor]
    ) -> tuple[list[Tensor], Sequence[Tensor]]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs = results(function(*leaves))
        given = [grad.to(output) for grad, output in zip(grads, outputs, strict=True)]
        return [o.detach() for o in outputs], torch.autograd.grad(outputs, leaves, given)

    grads = [torch.randn_like(o) for o in results(functions["eager"](*inputs))]
    eager = both(functions["eager"], inputs, grads)
    exact = both(functions["eager"], [t.double() for t in inputs], grads)
    for name, function in functions.items():
        got = both(function, inputs, grads)
        for what, *lists in zip(("output", "gradient of input"), got, eager, exact, strict=True):
            for i, (ours, same, ideal) in enumerate(zip(*lists, strict=True)):
                assert_parity(ours, same, ideal, f"{name}, {what} {i}", inputs[0].dtype)
