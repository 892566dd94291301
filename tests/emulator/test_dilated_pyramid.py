"""csrc/cuda/dilated_pyramid.cu on the emulator against the reference in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernelpose.reference.dilated_pyramid import dilated_pyramid
from tests.emulator import build
from tests.emulator.barriers import Right, barriers, check_removal
from tests.emulator.run import Call, EmulatorError, run
from tests.ops.test_dilated_pyramid import CASES, Case
from tests.parity import assert_parity

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # by dtype code
NAMES = (
    "stem", "stem-tokens", "sum", "sum-tokens", "odd", "odd-tokens", "wide", "wide-tokens",
    "sum-of-any", "one-convolution", "one-pixel",
)  # fmt: skip
MORE = {
    # Tiles of 16 rows take more blocks than an H100 has multiprocessors.
    "large-tiles": Case((70, 8, 17, 18), (8,), (1,), activation="none"),
    "large-tiles-tokens": Case((70, 8, 17, 18), (32,), (1,), activation="none", tokens=True),
    "aligned-planes": Case((1, 16, 9, 24), (24, 40), (1, 2), activation="none"),
    "far": Case((1, 8, 5, 4), (8,), (80,), activation="none"),
    "ten": Case((1, 4, 3, 4), (4,) * 10, (1,) * 10, activation="none"),
}


@pytest.fixture(scope="module")
def module() -> Path:
    return build.extension()


def _as_it_lies(x: Tensor) -> Tensor:
    """A contiguous tensor of the same memory, which is what the emulator is given."""
    return x if x.is_contiguous() else x.permute(0, 2, 3, 1)


def _calls(
    case: Case, dtype: torch.dtype, keep: bool = True
) -> tuple[Call, Call, dict[torch.dtype, Tensor], Tensor]:
    """The workspace's size and the forward pass, what it has to write, and all maps in float64."""
    x, *parameters = (t.detach() for t in case.inputs(dtype))
    count = len(case.widths)
    weights, biases = parameters[:count], parameters[count:]
    options = tuple(case.options.values())
    expected = {
        d: dilated_pyramid(x.to(d), weights, biases, *options) for d in (dtype, torch.float64)
    }
    options = (*options[:2], "concat", options[3])
    maps = dilated_pyramid(x.double(), weights, biases, *options)
    layers = [list(one) for one in zip(weights, biases, case.widths, case.dilations, strict=True)]
    shape = (*case.shape, case.tokens, case.stride, case.activation == "relu", case.mode == "sum")
    size = Call("cuda_dilated_pyramid_workspace", [layers, shape])
    out, every = (torch.full_like(t, torch.nan, dtype=dtype) for t in (expected[dtype], maps))
    total = [_as_it_lies(out), _as_it_lies(every) if case.mode == "sum" else 0, keep]
    rest = [shape, DTYPES.index(dtype), 0]
    return size, Call("", [_as_it_lies(x), layers, *total, None, *rest]), expected, maps


def _ready(module: Path, size: Call, call: Call) -> Call:
    """The call with the workspace that it needs."""
    (workspace,) = run(module, [size])
    args = [*call.args]
    args[5] = torch.full((workspace.value,), torch.nan, dtype=args[0].dtype)
    return Call("cuda_dilated_pyramid_forward", args)


# The emulator takes seconds for so many blocks.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name,
            dtype,
            marks=pytest.mark.full
            if name.startswith("large-tiles") and (name, dtype) != ("large-tiles", torch.float16)
            else (),
        )
        for name in (*NAMES, *MORE)
        for dtype in DTYPES
    ],
    ids=str,
)
def test_parity(name: str, dtype: torch.dtype, module: Path) -> None:
    case = (CASES | MORE)[name]
    size, call, expected, maps = _calls(case, dtype)
    call = _ready(module, size, call)
    calls = [Call(call.function, call.args, {"seed": s}) for s in range(2)]
    first, other = (result.args for result in run(module, calls))
    for a, b in zip(first[2:4], other[2:4], strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b)
    assert torch.equal(first[0], call.args[0])
    out, every = (
        t.permute(0, 3, 1, 2) if isinstance(t, Tensor) and case.tokens else t for t in first[2:4]
    )
    assert_parity(out, expected[dtype], expected[torch.float64], "out", dtype)
    if case.mode == "sum":
        count = len(case.widths)
        x, *parameters = (t.detach() for t in case.inputs(dtype))
        options = (case.dilations, case.stride, "concat", case.activation)
        eager = dilated_pyramid(x, parameters[:count], parameters[count:], *options)
        assert_parity(every, eager, maps, "maps", dtype)


def test_last_map_of_the_sum_is_not_written_unless_wanted(module: Path) -> None:
    case = CASES["sum"]
    size, call, expected, _ = _calls(case, torch.float32, keep=False)
    _, _, out, every, *_ = run(module, [_ready(module, size, call)])[0].args
    assert_parity(out, expected[torch.float32], expected[torch.float64])
    assert every[:, -32:].isnan().all() and not every[:, :-32].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["stem", "stem-tokens", "sum-tokens", "odd"])
@pytest.mark.parametrize("given", ["all", "no carry", "no maps"])
def test_gradient_before_the_activation(
    given: str, name: str, dtype: torch.dtype, module: Path
) -> None:
    """Of the second layer, whose maps are a slice."""
    case = CASES[name]
    first, width, channels = case.widths[0], case.widths[1], sum(case.widths)
    draw = torch.Generator().manual_seed(0)
    grad_out, maps = torch.randn(2, 2, channels, 6, 8, generator=draw).to(dtype)
    carry = torch.randn(2, width, 6, 8, generator=draw).to(dtype)
    maps = F.relu(maps)
    ours = slice(first, first + width)
    expected = grad_out[:, ours].float() + (0 if given == "no carry" else carry.float())
    expected = expected if given == "no maps" else expected * (maps[:, ours] > 0)

    def lies(t: Tensor) -> Tensor:
        return t.permute(0, 2, 3, 1).contiguous() if case.tokens else t

    row, rows = (1, 2 * 48) if case.tokens else (48, 2)
    # The slice starts inside its memory: the rows before it are cut off.
    slices = [lies(t).flatten()[first * row :].contiguous() for t in (grad_out, maps)]
    table = (rows, width * row, channels * row, channels * row)
    grad = torch.full_like(lies(carry).contiguous(), torch.nan)
    args = [
        slices[0],
        0 if given == "no carry" else lies(carry),
        0 if given == "no maps" else slices[1],
        grad,
        table,
        DTYPES.index(dtype),
        0,
    ]
    (result,) = run(module, [Call("cuda_dilated_pyramid_mask", args)])
    got = result.args[3].permute(0, 3, 1, 2) if case.tokens else result.args[3]
    assert torch.equal(got, expected.to(dtype))


def test_other_dtypes_are_an_error(module: Path) -> None:
    size, call, *_ = _calls(CASES["stem"], torch.float32)
    call = Call("", [*call.args[:-2], 3, 0])
    with pytest.raises(EmulatorError, match="check_cuda"):  # ASan ends where it throws
        run(module, [_ready(module, size, call)])


@pytest.fixture(scope="module")
def right(module: Path) -> Right:
    """Calls that need every barrier, and what they leave when nothing is left out."""
    cases = [
        Case((1, 36, 5, 17), (24, 20), (1, 2), mode="concat", activation="none", tokens=tokens)
        for tokens in (False, True)
    ]
    cases.append(Case((1, 10, 5, 17), (16,), (80,), activation="none"))
    # The last layer writes twice through the same staging.
    cases.append(Case((1, 8, 5, 17), (24, 24), (1, 2), mode="sum", activation="none"))
    calls = [_ready(module, *_calls(case, torch.float16)[:2]) for case in cases]
    return [(call, run(module, [call])[0].args) for call in calls]


OWN = [
    barrier
    for barrier in barriers(
        "dilated_pyramid", "__syncthreads", "__syncwarp", "cp_async_commit", "cp_async_wait"
    )
    if barrier.startswith("dilated_pyramid")
]


@pytest.mark.parametrize("barrier", OWN)
def test_removed_barrier_is_caught(barrier: str, module: Path, right: Right) -> None:
    check_removal(barrier, module, right)
