"""csrc/cuda/reduced_attention*.cu on the emulator against the reference in float64."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernelpose.reference.reduced_attention import reduced_attention
from tests.emulator import build
from tests.emulator.barriers import Right, barriers, check_removal
from tests.emulator.run import Call, EmulatorError, run, same
from tests.parity import assert_parity

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # by dtype code


@dataclass(frozen=True)
class Case:
    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype = torch.float16
    heads: int = 1
    batch: int = 1
    scale: float = 0.4

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.heads}-{self.queries}x{self.keys}-d{self.head_dim}"
        return f"{sizes}-{str(self.dtype)[6:]}"

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, kv, gradient of the output."""
        generator = torch.Generator().manual_seed(0)
        channels = self.heads * self.head_dim
        shapes = [(self.queries, channels), (self.keys, 2 * channels), (self.queries, channels)]
        q, kv, grad = (torch.randn(self.batch, *s, generator=generator) for s in shapes)
        return q.to(self.dtype), kv.to(self.dtype), grad.to(self.dtype)

    @property
    def arguments(self) -> tuple[object, ...]:
        """Shape, dtype and stream, as the bindings take them."""
        sizes = (self.batch, self.queries, self.keys, self.heads, self.head_dim, self.scale)
        return sizes, DTYPES.index(self.dtype), 0

    @property
    def lse(self) -> Tensor:
        q, kv, _ = (t.double() for t in self.tensors)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = kv.unflatten(-1, (2, self.heads, -1))[:, :, 0].permute(0, 2, 3, 1)
        return ((self.scale * q @ k).logsumexp(-1) / math.log(2)).float()

    def reference(self, dtype: torch.dtype) -> list[Tensor]:
        """out, grad_q, grad_kv, computed in `dtype`."""
        q, kv, grad = (t.to(dtype) for t in self.tensors)
        leaves = [q.requires_grad_(), kv.requires_grad_()]
        out = reduced_attention(*leaves, self.heads, self.scale)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def forward(self, lse: bool = True) -> Call:
        q, kv, grad = self.tensors
        wanted = torch.full_like(self.lse, torch.nan) if lse else 0
        args = [q, kv, torch.full_like(grad, torch.nan), wanted, *self.arguments]
        return Call("cuda_reduced_attention_forward", args)

    def backward(self, module: Path, lse: Tensor) -> Call:
        q, kv, grad = self.tensors
        size = Call("cuda_reduced_attention_backward_workspace", self.arguments[:2])
        workspace = torch.full((run(module, [size])[0].value,), 0xFF, dtype=torch.uint8)
        nothing = [torch.full_like(t, torch.nan) for t in (q, kv)]
        args = [grad, q, kv, lse, *nothing, workspace, *self.arguments]
        return Call("cuda_reduced_attention_backward", args)


CASES = [
    Case(100, 48, 64),
    Case(70, 48, 32, torch.bfloat16, heads=2),
    Case(40, 108, 64, torch.bfloat16),
    Case(33, 108, 20, torch.float32),
    Case(37, 29, 30, heads=3, batch=2),
    Case(20, 300, 40),  # more keys than the ring holds
    Case(30, 70, 80),
    Case(18, 40, 128, torch.float32),
    Case(4, 4, 8, batch=0),
    Case(0, 4, 8),
]
MORE = [
    Case(48, 48, 64, torch.float32, heads=2),
    Case(20, 170, 24, torch.float32),
    Case(17, 50, 80, torch.float32),
    Case(20, 70, 128, torch.bfloat16),
    Case(1, 2, 1),
    Case(9, 17, 1, torch.float32, heads=2),
]
# So many blocks that each takes several tiles of queries, three at least.
MANY = Case(130, 20, 16, heads=33, batch=16)
MANY_FLOAT = Case(65, 20, 8, torch.float32, heads=33, batch=16)


@pytest.fixture(scope="module")
def module() -> Path:
    return build.extension()


def run_deterministic(module: Path, call: Call, read: int) -> list[Tensor]:
    """What the call leaves in its arguments, the same with every seed; it only reads the first."""
    results = run(module, [Call(call.function, call.args, {"seed": s}) for s in range(2)])
    first, other = (result.args for result in results)
    assert same(first, other) and same(first[:read], list(call.args[:read]))
    return first


@pytest.mark.parametrize("case", [*CASES, MANY], ids=str)
def test_parity(case: Case, module: Path) -> None:
    check(module, case)


def check(module: Path, case: Case) -> None:
    _, _, out, lse, *_ = run_deterministic(module, case.forward(), 2)
    torch.testing.assert_close(lse, case.lse, rtol=1e-5, atol=1e-5)
    backward = run_deterministic(module, case.backward(module, lse), 4)
    got = [out, *backward[4:6]]
    if case.queries == 0:  # the caller clears the gradient of kv
        got[2] = torch.zeros_like(got[2])
    names = ("out", "gradient of q", "gradient of kv")
    references = (case.reference(dtype) for dtype in (case.dtype, torch.float64))
    for name, *three in zip(names, got, *references, strict=True):
        assert_parity(*three, name, case.dtype)


def test_lse_is_optional(module: Path) -> None:
    case = CASES[0]
    with_lse, without = (run(module, [case.forward(lse)])[0].args[2] for lse in (True, False))
    assert torch.equal(with_lse, without)


def test_other_dtypes_are_an_error(module: Path) -> None:
    call = CASES[0].forward()
    args = [3 if i == 5 else a for i, a in enumerate(call.args)]
    with pytest.raises(EmulatorError, match="check_cuda"):  # ASan ends where it throws
        run(module, [Call(call.function, args)])


@pytest.mark.full
@pytest.mark.parametrize("case", [*MORE, MANY_FLOAT], ids=str)
def test_more_parity(case: Case, module: Path) -> None:
    check(module, case)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [20, 32, 64, 80, 128])
@pytest.mark.parametrize("keys", [5, 48, 64, 108, 280])
def test_parity_in_full(keys: int, head_dim: int, dtype: torch.dtype, module: Path) -> None:
    check(module, Case(75, keys, head_dim, dtype, heads=2))


# Together they pass every barrier with something at stake; the slow one comes last.
BARRIER_CASES = [Case(150, 48, 16), Case(40, 108, 16), Case(20, 300, 16), MANY]


@pytest.fixture(scope="module")
def right(module: Path) -> Right:
    """The calls of BARRIER_CASES and what they leave when nothing is left out."""
    calls = [c for case in BARRIER_CASES for c in (case.forward(), case.backward(module, case.lse))]
    return [(call, run(module, [call])[0].args) for call in calls]


@pytest.mark.parametrize("barrier", barriers("reduced_attention", "__syncthreads"))
def test_removed_barrier_is_caught(barrier: str, module: Path, right: Right) -> None:
    check_removal(barrier, module, right, seeds=(0, 1))


@pytest.mark.full
@pytest.mark.parametrize(
    "barrier", barriers("reduced_attention", "__syncwarp", "cp_async_commit", "cp_async_wait")
)
def test_removed_wait_is_caught(barrier: str, module: Path, right: Right) -> None:
    check_removal(barrier, module, right, seeds=(0, 1))
