"""csrc/cuda/heatmap_loss.cu on the emulator against the reference in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernelpose.reference.heatmap_loss import TARGET_CODECS, heatmap_loss, pixel_ratio
from tests.emulator import build
from tests.emulator.barriers import Right, barriers, check_removal
from tests.emulator.run import Call, run, same
from tests.ops.test_heatmap_loss import CASES, Case
from tests.parity import assert_parity

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # by dtype code
GRAD_LOSS = 512.0  # a scaler's

NAMES = ("udp", "odd", "odd-msra", "odd-unbiased", "wide", "pixels-of-halves", "one-pixel")
NAMES += ("crossing", "crossing-msra", "crossing-unbiased")
MANY = replace(CASES["pixels-of-halves"], batch=400)  # more maps than the last sum has threads


@pytest.fixture(scope="module")
def module() -> Path:
    return build.extension()


def _shape(case: Case) -> tuple[object, ...]:
    """What the bindings call the shape."""
    ratio = pixel_ratio(case.input_size, case.size, udp=case.codec == "udp")
    codec = TARGET_CODECS.index(case.codec)
    return (case.batch * case.joints, *case.size, *ratio, case.sigma, codec)


def _calls(case: Case, dtype: torch.dtype) -> tuple[Call, Call]:
    """Forward and backward, what they write poisoned."""
    pred = case.inputs(dtype)[0].detach()
    labels = case.labels("cpu")
    loss, sums = torch.full((), torch.nan), torch.full((case.batch, case.joints), torch.nan)
    rest = (_shape(case), DTYPES.index(dtype), 0)
    return (
        Call("cuda_heatmap_loss_forward", [pred, *labels, loss, sums, *rest]),
        Call(
            "cuda_heatmap_loss_backward",
            [torch.tensor(GRAD_LOSS), pred, *labels, torch.full_like(pred, torch.nan), *rest],
        ),
    )


def _reference(case: Case, pred: Tensor) -> tuple[Tensor, Tensor]:
    leaf = pred.detach().requires_grad_()
    options = (case.input_size, case.sigma, case.codec)
    loss = heatmap_loss(leaf, *case.labels("cpu"), *options)
    return loss.detach(), torch.autograd.grad(loss * GRAD_LOSS, leaf)[0]


def _run_deterministic(module: Path, call: Call) -> list[object]:
    """What the call leaves in its arguments: the same with every seed."""
    first, other = run(module, [Call(call.function, call.args, {"seed": s}) for s in range(2)])
    assert same(first.args, other.args)
    return first.args


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*(CASES[name] for name in NAMES), MANY], ids=[*NAMES, "many"])
def test_parity(case: Case, dtype: torch.dtype, module: Path) -> None:
    forward, backward = _calls(case, dtype)
    pred, keypoints, visible, loss, *_ = _run_deterministic(module, forward)
    assert same([pred, keypoints, visible], list(forward.args[:3]))
    *inputs, gradient, _, _, _ = _run_deterministic(module, backward)
    assert same(inputs, list(backward.args[:4]))
    eager, exact = (_reference(case, forward.args[0].to(d)) for d in (dtype, torch.float64))
    assert_parity(loss, eager[0], exact[0], "loss")
    assert_parity(gradient, eager[1], exact[1], "gradient", dtype)


def test_maps_that_do_not_count_are_not_read(module: Path) -> None:
    case = CASES["small"]
    forward, backward = _calls(case, torch.float32)
    for call, place in ((forward, 0), (backward, 1)):
        call.args[place + 2][:, 2] = 0.0
        clean = _run_deterministic(module, call)
        call.args[place][:, 2] = torch.nan
        assert same(_run_deterministic(module, call)[3:], clean[3:])


@pytest.fixture(scope="module")
def right(module: Path) -> Right:
    """Calls that need every barrier, and what they leave when nothing is left out."""
    calls = [call for name in ("udp", "odd") for call in _calls(CASES[name], torch.float16)]
    return [(call, run(module, [call])[0].args) for call in calls]


OWN = [b for b in barriers("heatmap_loss", "__syncthreads") if b.startswith("heatmap_loss")]


@pytest.mark.parametrize("barrier", OWN)
def test_removed_barrier_is_caught(barrier: str, module: Path, right: Right) -> None:
    check_removal(barrier, module, right)
