"""Whole models: a kernel that wins alone and loses here is not done."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import kernelpose
from benchmarks.attention import Case
from benchmarks.rows import Function, Row, time_forward
from benchmarks.setup import compiled, parameters
from kernelpose.pipeline.timing import synchronized
from tests.parity import assert_parity

Model = tuple[str, dict[str, Any]]

WINDOWED = {"patch_stride": 8, "attention": "window+shift"}
MODELS: dict[str, tuple[Model, tuple[int, ...]]] = {
    "vitpose-s": (("vitpose-s", {}), (1,)),
    "vitpose-b": (("vitpose-b", {}), (1,)),
    "vitpose-s 1/8 shifted windows": (("vitpose-s", WINDOWED), (1,)),
    "vitpose-b 1/8 shifted windows": (("vitpose-b", WINDOWED), (1,)),
}


class _PeerAttention:
    """Stands in for the op: what a careful user writes with SDPA, masks made once."""

    def __init__(self) -> None:
        self._made: dict[Any, Function] = {}

    def __call__(
        self,
        qkv: Tensor,
        *,
        num_heads: int,
        window: tuple[int, int] | None,
        shift: tuple[int, int],
        partition: str,
        scale: float | None,
        **_: Any,
    ) -> Tensor:
        size = (qkv.shape[1], qkv.shape[2])
        case = Case(size, qkv.shape[3] // 3, num_heads, window, shift, partition)
        if case not in self._made:
            self._made[case] = case.peer(qkv.device, qkv.dtype)
        return self._made[case](qkv)


def _forms(model: nn.Module, compiles: bool) -> dict[str, Function]:
    """The contenders. Each compiled form is a function of its own, with a cache of its own."""
    peer = _PeerAttention()

    def ours(images: Tensor) -> Tensor:
        return model(images)

    def eager(images: Tensor) -> Tensor:
        with kernelpose.backend("eager"):
            return model(images)

    def sdpa(images: Tensor) -> Tensor:
        return model(images)

    def with_peer(function: Function) -> Function:
        def run(images: Tensor) -> Tensor:
            with mock.patch.object(kernelpose.ops, "window_attention", peer):
                return function(images)

        return run

    forms: dict[str, Function] = {"kernelpose": ours, "eager": eager, "sdpa": with_peer(sdpa)}
    if compiles:
        forms |= compiled({"kernelpose compile": ours, "compile": eager, "compile sdpa": sdpa})
        forms["compile sdpa"] = with_peer(forms["compile sdpa"])
    return forms


@pytest.mark.parametrize(("described", "batch", "dtype"), parameters(MODELS))
def bench_model(
    described: Model,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compiles: bool,
    record: Callable[[Row], None],
    benchmark: Any,
    request: pytest.FixtureRequest,
) -> None:
    torch.manual_seed(0)
    name, options = described
    model: Any = kernelpose.create_model(name, **options).to(device).eval()
    images = torch.randn(1, 3, *model.image_size, device=device)
    with torch.no_grad():
        exact = model.double()(images.double())
        model.to(dtype)
        forms = _forms(model, compiles)
        eager = forms["eager"](images.to(dtype))
        for form in ("kernelpose", "kernelpose compile"):
            if form in forms:
                assert_parity(forms[form](images.to(dtype)), eager, exact, form)

    # One set of inputs: in use too, images follow each other through the same weights, and those
    # and the activations are what fills an L2 cache.
    images = torch.randn(batch, 3, *model.image_size, device=device, dtype=dtype)
    times = time_forward(forms, [[images]], device)
    mine = tuple(form for form in forms if form.startswith("kernelpose"))
    # Each side in its better form: the user has the same choice with ours as without.
    chosen = min(mine, key=lambda form: times[form].median)
    row = Row("model", request.node.callspec.id, "forward", str(dtype)[6:], times, mine, chosen)
    record(row)
    with torch.no_grad():
        benchmark(synchronized(functools.partial(forms[chosen], images)))
