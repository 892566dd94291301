"""Maps too large for a backend's indices or grid are objected to, before anything is allocated."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kernelpose.backend import OPS, choose
from tests.ops.test_window_attention import KERNELS, Case

GPU = ("cuda", "triton")

# what there is no room for -> (the backends that refuse, the last case within, the first beyond)
LIMITS = {
    "channels": (KERNELS, Case((2, 2), 2**26, 10), Case((2, 2), 2**26, 11)),
    "positions along a map and a window": (
        KERNELS,
        Case((8, 8), 1, 8, window=(4, 2**29 - 9)),
        Case((8, 8), 1, 8, window=(4, 2**29 - 8)),
    ),
    "tokens of an image": (
        ("cpu",),
        Case((2**15, 2**16 - 1), 1, 8, window=(4, 4)),
        Case((2**15, 2**16), 1, 8, window=(4, 4)),
    ),
    "numbers in bias_table": (
        ("cpu", "cuda"),
        Case((8, 8), 2, 8, window=(2**14, 2**14), bias=True),
        Case((8, 8), 2, 8, window=(2**14, 2**14 + 2), bias=True),
    ),
    "tokens of all images and heads": (
        GPU,
        Case((2**10, 2**10), 2, 8, window=(4, 4), batch=2**9 - 1),
        Case((2**10, 2**10), 2, 8, window=(4, 4), batch=2**9),
    ),
    "tokens of an image, times its width": (
        ("cuda",),
        Case((2**12 - 1, 2**10), 1, 8, window=(4, 4), batch=1),
        Case((2**12, 2**10), 1, 8, window=(4, 4), batch=1),
    ),
    "tokens of a group": (
        ("triton",),
        Case((2**13, 2**9 - 1), 1, 8, batch=1),
        Case((2**13, 2**9), 1, 8, batch=1),
    ),
    "slots of a padded window": (
        ("triton",),
        Case((8, 8), 1, 8, window=(2**15 - 1, 2**15), pooled=True),
        Case((8, 8), 1, 8, window=(2**15, 2**15), pooled=True),
    ),
    "pairs of tokens with a bias, of all heads": (
        ("triton",),
        Case((2**7, 2**7), 7, 8, bias=True),
        Case((2**7, 2**7), 8, 8, bias=True),
    ),
}


def _on_meta(case: Case) -> list[torch.Tensor]:
    channels = 3 * case.heads * case.head_dim
    inputs = [torch.empty(case.batch, *case.size, channels, device="meta")]
    if case.bias:
        h, w = case.extent
        inputs.append(torch.empty((2 * h - 1) * (2 * w - 1), case.heads, device="meta"))
    return inputs


def _objection(name: str, case: Case) -> str | None:
    args, options = case.arguments(_on_meta(case))
    return OPS[case.op].objection(name, *args, **options)


@pytest.mark.parametrize("what", LIMITS)
def test_no_room_is_an_objection(what: str) -> None:
    refusing, within, beyond = LIMITS[what]
    for name in refusing:
        assert _objection(name, within) is None
        reason = _objection(name, beyond)
        assert reason is not None and f" {what}, and this has " in reason


def test_no_room_lets_the_automatic_choice_fall_through(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(OPS["window_attention"], automatic=lambda _: ("cuda", "triton"))
    monkeypatch.setitem(OPS, spec.name, spec)
    monkeypatch.setitem(choose.__globals__, "_unavailable", lambda *_: None)

    def chosen(case: Case) -> str:
        args, options = case.arguments(_on_meta(case))
        return choose(spec.name, None, *args, **options)

    _, within, beyond = LIMITS["tokens of an image, times its width"]
    assert (chosen(within), chosen(beyond)) == ("cuda", "triton")
    assert chosen(LIMITS["tokens of all images and heads"][2]) == "eager"
