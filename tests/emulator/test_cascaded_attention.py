"""csrc/cuda/cascaded_attention.cu on the emulator against the reference in float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernelpose.reference.cascaded_attention import cascaded_attention
from tests.emulator import build
from tests.emulator.barriers import Right, barriers, check_removal
from tests.emulator.run import Call, EmulatorError, run, same
from tests.parity import assert_parity

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # by dtype code
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    size: tuple[int, int]
    ratio: int
    width: int  # of a group
    dtype: torch.dtype = torch.float16
    heads: int = 2
    groups: int = 2
    batch: int = 1
    eps: float = EPS

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.size[0]}x{self.size[1]}r{self.ratio}"
        return f"{sizes}-{self.groups}x{self.width}h{self.heads}-{str(self.dtype)[6:]}"

    @functools.cached_property
    def inputs(self) -> list[Tensor]:
        """x, weights and biases, as the op takes them."""
        g, d, r = self.groups, self.width, self.ratio
        shapes = [(self.batch, *self.size, g * d), (g * d, 1, r, r), (g * d,)]
        shapes += [(g, d, d), (g, d), (g, 2 * d, d), (g, 2 * d), (g, d, d), *3 * [(g, d)]]
        scales = [1, 1 / r, 1, d**-0.5, 1, d**-0.5, 1, d**-0.5, 1, 1, 1]
        generator = torch.Generator().manual_seed(0)
        tensors = (torch.randn(shape, generator=generator) for shape in shapes)
        return [(t * s).to(self.dtype) for t, s in zip(tensors, scales, strict=True)]

    def reference(self, dtype: torch.dtype) -> Tensor:
        inputs = (t.to(dtype) for t in self.inputs)
        return cascaded_attention(*inputs, num_heads=self.heads, eps=self.eps)

    def call(self, module: Path) -> Call:
        shape = (self.batch, *self.size, self.groups, self.width, self.heads, self.ratio, self.eps)
        code = DTYPES.index(self.dtype)
        size = Call("cuda_cascaded_attention_workspace", [shape, code])
        workspace = torch.full((run(module, [size])[0].value,), 0xFF, dtype=torch.uint8)
        out = torch.full_like(self.inputs[0], torch.nan)
        args = [*self.inputs, out, workspace, shape, code, 0]
        return Call("cuda_cascaded_attention_forward", args)


CASES = [
    Case((16, 8), 8, 16),  # a unit is one place
    Case((8, 12), 4, 40, torch.bfloat16, groups=3),  # four places a unit, and six of them
    Case((8, 6), 2, 96),
    Case((16, 8), 8, 40, torch.float32),  # a place's queries come in two passes
    Case((6, 10), 2, 24, torch.float32, batch=2),
    Case((9, 15), 3, 24, torch.bfloat16, heads=1, batch=2),  # nine queries a place, 63 a unit
    Case((18, 9), 9, 32),  # 81 queries a place: two passes, the second not full
    Case((10, 20), 10, 16, torch.float32),
    Case((9, 9), 1, 16, groups=1),  # more keys than a tile, one group
    Case((5, 5), 5, 8, heads=8),  # one key, one place; heads of one channel
    Case((4, 6), 2, 128, heads=1),
    Case((4, 4), 2, 128, torch.float32, heads=16),
    Case((4, 4), 2, 16, batch=0),
]
MORE = [
    Case((64, 48), 8, 40, torch.bfloat16),
    Case((24, 20), 2, 48),  # 120 keys
    Case((14, 13), 1, 72, torch.float32, heads=3),  # 182 keys, heads of 24
    Case((16, 16), 16, 128, torch.float32, heads=1),
    Case((7, 7), 7, 56, torch.bfloat16, heads=7),
    Case((32, 16), 8, 104, heads=4, eps=0.1),
]


@pytest.fixture(scope="module")
def module() -> Path:
    return build.extension()


def check(module: Path, case: Case) -> None:
    """The same with every seed, right, and nothing given is written."""
    call = case.call(module)
    calls = [Call(call.function, call.args, {"seed": seed}) for seed in range(2)]
    first, other = (result.args for result in run(module, calls))
    assert same(first, other) and same(first[:11], call.args[:11])
    assert_parity(first[11], case.reference(case.dtype), case.reference(torch.float64))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case, module: Path) -> None:
    check(module, case)


@pytest.mark.full
@pytest.mark.parametrize("case", MORE, ids=str)
def test_more_parity(case: Case, module: Path) -> None:
    check(module, case)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 32, 40, 48, 64, 96, 128])
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 8])
def test_parity_in_full(ratio: int, width: int, dtype: torch.dtype, module: Path) -> None:
    check(module, Case((3 * ratio, 2 * ratio), ratio, width, dtype, batch=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_where_it_belongs(dtype: torch.dtype, module: Path) -> None:
    """In its image, and from its group on; there all queries see it through its key."""
    case = Case((6, 10), 2, 24, dtype, groups=3, batch=2)
    call = case.call(module)
    call.args[0][1, 3, 4, 24 + 5] = torch.nan
    out = run(module, [call])[0].args[11]
    found = out.isnan()
    assert found[1, ..., 24:].all() and found.sum() == found[1, ..., 24:].numel()


@pytest.mark.parametrize("what", ["dtype", "width", "alignment"])
def test_what_it_does_not_take_is_an_error(what: str, module: Path) -> None:
    call = (Case((4, 4), 2, 12) if what == "width" else Case((4, 4), 2, 16)).call(module)
    args = list(call.args)
    if what == "dtype":
        args[14] = 3
    elif what == "alignment":
        args[5] = 8  # an address, which nobody reads
    with pytest.raises(EmulatorError, match="check_cuda"):  # ASan ends where it throws
        run(module, [Call(call.function, args)])


def own_barriers(*names: str) -> list[str]:
    """Not those of the shared loops over tiles, which this op has no use for."""
    return [b for b in barriers("cascaded_attention", *names) if b.startswith("cascaded")]


# Together they pass every barrier with something at stake.
BARRIER_CASES = [
    Case((8, 8), 4, 16),
    Case((18, 9), 9, 16),
    Case((8, 8), 2, 96, heads=1),
    Case((9, 8), 1, 16, groups=1),
]


@pytest.fixture(scope="module")
def right(module: Path) -> Right:
    """The calls of BARRIER_CASES and what they leave when nothing is left out."""
    calls = [case.call(module) for case in BARRIER_CASES]
    return [(call, run(module, [call])[0].args) for call in calls]


@pytest.mark.parametrize("barrier", own_barriers("__syncthreads"))
def test_removed_barrier_is_caught(barrier: str, module: Path, right: Right) -> None:
    check_removal(barrier, module, right, seeds=(0, 1))


@pytest.mark.full
@pytest.mark.parametrize("barrier", own_barriers("__syncwarp", "cp_async_commit", "cp_async_wait"))
def test_removed_wait_is_caught(barrier: str, module: Path, right: Right) -> None:
    check_removal(barrier, module, right, seeds=(0, 1))
