"""Whole models and modules: a kernel that wins alone and loses here is not done."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import kernelpose
from benchmarks.attention import Case
from benchmarks.plain import copy_weights
from benchmarks.plain.zoo import PLAIN
from benchmarks.rows import Function, Row, time_forward
from benchmarks.setup import compiled, parameters
from kernelpose.nn import ScConv, WindowAttention
from kernelpose.pipeline.timing import synchronized
from tests.parity import assert_parity

IMAGE = (3, 256, 192)


@dataclass(frozen=True)
class Subject:
    """A model, its input less the batch, and the model in plain PyTorch where ours is not that."""

    ours: Callable[[], nn.Module]
    shape: tuple[int, ...] = IMAGE
    plain: Callable[[], nn.Module] | None = None


class _Joined(nn.Module):
    """A SimCC model with one tensor of logits for an answer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(self.model(images), 2)


def model_subject(name: str, **options: Any) -> Subject:
    """A model of the zoo, and its plain form."""

    def made(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        return (lambda: _Joined(build())) if name.startswith("hrpvt") else build

    plain = functools.partial(PLAIN[name], IMAGE[1:]) if name in PLAIN else None
    ours = functools.partial(kernelpose.create_model, name, **options)
    return Subject(made(ours), plain=plain and made(plain))


WINDOWED: dict[str, Any] = {"patch_stride": 8, "attention": "window+shift"}
SUBJECTS: dict[str, tuple[Subject, tuple[int, ...]]] = {
    "vitpose-s": (model_subject("vitpose-s"), (1,)),
    "vitpose-b": (model_subject("vitpose-b"), (1,)),
    "vitpose-s 1/8 shifted windows": (model_subject("vitpose-s", **WINDOWED), (1,)),
    "vitpose-b 1/8 shifted windows": (model_subject("vitpose-b", **WINDOWED), (1,)),
    "mitpose-b": (model_subject("mitpose-b"), (1, 8)),
    "mitpose-b-released": (model_subject("mitpose-b-released"), (1,)),
    "hevitpose-b": (model_subject("hevitpose-b"), (1, 8)),
    "mobilevitpose-s": (model_subject("mobilevitpose-s"), (1, 8)),
    "hrpvt-l": (model_subject("hrpvt-l"), (1, 8)),
    "ScConv 768 tokens": (Subject(lambda: ScConv(768), (16 * 12, 768)), (1, 8)),
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


def _forms(model: nn.Module, plain: nn.Module | None, compiles: bool) -> dict[str, Function]:
    """The contenders. Each compiled form is a function of its own, with a cache of its own."""
    peer = _PeerAttention()

    def ours(x: Tensor) -> Tensor:
        return model(x)

    def sdpa(x: Tensor) -> Tensor:
        with kernelpose.backend("eager"):  # all but attention, which is the peer's
            return model(x)

    def with_peer(function: Function) -> Function:
        def run(x: Tensor) -> Tensor:
            with mock.patch.object(kernelpose.ops, "window_attention", peer):
                return function(x)

        return run

    forms: dict[str, Function] = {"kernelpose": ours}
    if plain is not None:
        forms |= _plain_forms(plain)
    else:
        forms["eager"] = _eager(model)
        if any(isinstance(module, WindowAttention) for module in model.modules()):
            forms["sdpa"] = sdpa
    if compiles:
        forms |= compiled({f"{name} compile": form for name, form in forms.items()})
    return {name: with_peer(f) if name.startswith("sdpa") else f for name, f in forms.items()}


def _eager(model: nn.Module) -> Function:
    def eager(x: Tensor) -> Tensor:
        with kernelpose.backend("eager"):
            return model(x)

    return eager


def _plain_forms(model: nn.Module) -> dict[str, Function]:
    """In both memory formats: which is the faster is a user's to find out."""
    other = copy.deepcopy(model)
    nn.utils.convert_conv2d_weight_memory_format(other, torch.channels_last)

    def contiguous(x: Tensor) -> Tensor:
        return model(x)

    def channels_last(x: Tensor) -> Tensor:
        return other(x.contiguous(memory_format=torch.channels_last))

    return {"plain": contiguous, "plain channels_last": channels_last}


@pytest.mark.parametrize(("subject", "batch", "dtype"), parameters(SUBJECTS))
def bench_model(
    subject: Subject,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compiles: bool,
    record: Callable[[Row], None],
    benchmark: Any,
    request: pytest.FixtureRequest,
) -> None:
    torch.manual_seed(0)
    model = subject.ours().to(device).eval()
    plain = subject.plain().to(device, dtype).eval() if subject.plain is not None else None
    if plain is not None:
        copy_weights(model, plain)
    x = torch.randn(batch, *subject.shape, device=device)
    with torch.no_grad():
        exact = model.double()(x.double())
        model.to(dtype)
        x = x.to(dtype)
        eager = _eager(model)(x)
        forms = _forms(model, plain, compiles)
        mine = tuple(name for name in forms if name.startswith("kernelpose"))
        for name in mine:
            assert_parity(forms[name](x), eager, exact, name)

    # One set of inputs: in use too, images follow each other through the same weights, and those
    # and the activations are what fills an L2 cache.
    times = time_forward(forms, [[x]], device)
    # Each side in its better form: the user has the same choice with ours as without.
    chosen = min(mine, key=lambda form: times[form].median)
    row = Row("model", request.node.callspec.id, "forward", str(dtype)[6:], times, mine, chosen)
    record(row)
    with torch.no_grad():
        benchmark(synchronized(functools.partial(forms[chosen], x)))
