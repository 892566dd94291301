"""csrc/cuda/inverted_bottleneck.cu on the emulator against the reference in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernelpose.reference.inverted_bottleneck import ACTIVATIONS
from tests.emulator import build
from tests.emulator.barriers import Right, barriers, check_removal
from tests.emulator.run import Call, EmulatorError, run
from tests.ops.test_inverted_bottleneck import CASES as OF_THE_OP
from tests.ops.test_inverted_bottleneck import Case
from tests.parity import assert_parity

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # by dtype code
# Blocks are fewer than an H100 has multiprocessors for all but "many-blocks", so that tiles are
# small: of 4 x 4 or 1 x 4 pixels, or 16 in a row.
CASES = {name: OF_THE_OP[name] for name in ("small", "odd", "odd-stride", "even-stride")}
CASES |= {name: OF_THE_OP[name] for name in ("one-pixel-stride", "one-row", "pointwise", "batch-0")}
CASES |= {
    "slices": Case(1, (272, 24, 16), (3, 4), activations=("silu", "silu")),
    "odd-slices": Case(1, (265, 17, 5), (2, 3), 2),
    "all-sums": Case(1, (16, 16, 200), (2, 2)),  # of 192 outputs, and 8 in a second block
    "half-sums": Case(1, (8, 40, 104), (3, 3), 2),
    "pointwise-slices": Case(1, (264, 40, 264), (3, 6), residual=True, depthwise=False),
}
MORE = {
    "many-blocks": Case(33, (8, 40, 16), (14, 15)),  # tiles of 8 x 8, the last ones in part
    "many-blocks-stride": Case(33, (8, 16, 40), (14, 15), 2),
    "many-tokens": Case(44, (24, 16, 24), (13, 15), residual=True, depthwise=False),
    "stage": OF_THE_OP["stage"],
    "wide": OF_THE_OP["wide"],
    "several-blocks": OF_THE_OP["several-blocks"],
    "widest": Case(1, (640, 80, 640), (4, 4), residual=True),
}


@pytest.fixture(scope="module")
def module() -> Path:
    return build.extension()


def call_of(case: Case, dtype: torch.dtype, spoil: bool = False) -> Call:
    x, *weights = case.inputs(dtype)
    x = x.permute(0, 2, 3, 1).contiguous()
    if spoil:
        x[-1, 0, 0, 1] = torch.nan
    given: list[Tensor | int] = [*weights] if case.depthwise else [*weights[:2], 0, 0, *weights[2:]]
    size = [(side + case.stride - 1) // case.stride for side in case.size]
    out = torch.full((case.batch, *size, case.channels[2]), torch.nan, dtype=dtype)
    inputs, hidden, outputs = case.channels
    sizes = (case.batch, *case.size, inputs, hidden, outputs, case.stride)
    codes = [list(ACTIVATIONS).index(name) for name in case.activations]
    args = [x, given, out, sizes, case.residual, codes, DTYPES.index(dtype), 0]
    return Call("cuda_inverted_bottleneck", args)


def check(module: Path, case: Case, dtype: torch.dtype) -> None:
    """The same with every seed, right, and nothing given is written."""
    call = call_of(case, dtype)
    calls = [Call(call.function, call.args, {"seed": seed}) for seed in range(2)]
    (x, weights, out, *_), (_, _, again, *_) = (result.args for result in run(module, calls))
    assert torch.equal(out, again) and torch.equal(x, call.args[0])
    for after, before in zip(weights, call.args[1], strict=True):
        assert not isinstance(before, Tensor) or torch.equal(after, before)
    inputs = case.inputs(dtype)
    eager, exact = (case.run([t.to(d) for t in inputs], "eager") for d in (dtype, torch.float64))
    assert_parity(out.permute(0, 3, 1, 2), eager, exact, "out", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_parity(name: str, dtype: torch.dtype, module: Path) -> None:
    check(module, CASES[name], dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MORE)
def test_more_parity(name: str, dtype: torch.dtype, module: Path) -> None:
    check(module, MORE[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_reaches_its_neighbours_alone(dtype: torch.dtype, module: Path) -> None:
    call = call_of(CASES["odd"], dtype, spoil=True)
    found = run(module, [call])[0].args[2].isnan()
    assert found[-1, :2, :2].all() and found.sum() == found[-1, :2, :2].numel()


@pytest.mark.parametrize("what", ["dtype", "pixels"])
def test_what_it_does_not_take_is_an_error(what: str, module: Path) -> None:
    call = call_of(CASES["small"], torch.float16)
    args = list(call.args)
    if what == "dtype":
        args[6] = 3
    else:
        args[3] = (1, 2**16, 2**15, *args[3][3:])
    with pytest.raises(EmulatorError, match="check_cuda"):  # ASan ends where it throws
        run(module, [Call(call.function, args)])


# Together they pass every barrier with something at stake.
BARRIER_CASES = [
    Case(1, (16, 40, 104), (5, 5)),
    Case(1, (272, 40, 16), (3, 4)),
]
PRIMITIVES = ("__syncthreads", "cp_async_commit", "cp_async_wait")
OWN = [b for b in barriers("inverted_bottleneck", *PRIMITIVES) if b.startswith("inverted")]


@pytest.fixture(scope="module")
def right(module: Path) -> Right:
    """The calls of BARRIER_CASES and what they leave when nothing is left out."""
    calls = [call_of(case, torch.float16) for case in BARRIER_CASES]
    return [(call, run(module, [call])[0].args) for call in calls]


@pytest.mark.parametrize("barrier", OWN)
def test_removed_barrier_is_caught(barrier: str, module: Path, right: Right) -> None:
    check_removal(barrier, module, right, seeds=(0, 1))
