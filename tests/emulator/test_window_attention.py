"""csrc/cuda/window_attention*.cu on the emulator against the reference in float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernelpose.reference.window_attention import window_attention
from tests.emulator import build
from tests.emulator.barriers import Right, barriers, check_removal
from tests.emulator.run import Call, run, same
from tests.parity import assert_parity

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # by dtype code


@dataclass(frozen=True)
class Case:
    size: tuple[int, int]
    head_dim: int
    dtype: torch.dtype = torch.float16
    window: tuple[int, int] | None = None
    shift: tuple[int, int] = (0, 0)
    partition: str = "window"
    bias: bool = False
    pooled: bool = False
    heads: int = 1
    batch: int = 1
    scale: float | None = None

    def __str__(self) -> str:
        parts = [f"{self.size[0]}x{self.size[1]}", f"d{self.head_dim}", str(self.dtype)[6:]]
        if self.window is not None:
            parts.append("{}{}x{}".format(self.partition, *self.window))
        parts += [f"shift{self.shift[0]}-{self.shift[1]}"] if any(self.shift) else []
        parts += [name for name in ("bias", "pooled") if getattr(self, name)]
        return "-".join(parts)

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """qkv, bias table, gradient of the output."""
        generator = torch.Generator().manual_seed(0)
        channels = self.heads * self.head_dim
        qkv = torch.randn(self.batch, *self.size, 3 * channels, generator=generator)
        grad = torch.randn(self.batch, *self.size, channels, generator=generator)
        h, w = self.window or self.size
        if self.partition == "grid":
            h, w = (-(-s // p) for s, p in zip(self.size, (h, w), strict=True))
        table = torch.randn((2 * h - 1) * (2 * w - 1), self.heads, generator=generator)
        return qkv.to(self.dtype), table if self.bias else None, grad.to(self.dtype)

    @property
    def shape(self) -> tuple[object, ...]:
        """What the bindings call the shape."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        window = self.window or self.size
        grid = self.partition == "grid"
        counts = (self.batch, *self.size, self.heads, self.head_dim)
        return (*counts, *window, *self.shift, grid, self.pooled, scale)

    def reference(self, dtype: torch.dtype) -> list[Tensor]:
        """out, grad_qkv and, with a bias, grad_bias, computed in `dtype`."""
        qkv, table, grad = self.tensors
        qkv = qkv.to(dtype).requires_grad_()
        # The op keeps the table in float32, whatever the type of qkv.
        table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        table = None if table is None else table.to(table_dtype).requires_grad_()
        out = window_attention(
            qkv, table, self.heads, self.window, self.shift, self.partition, self.pooled, self.scale
        )
        inputs = [qkv] if table is None else [qkv, table]
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]


D20 = Case((9, 7), 20, window=(4, 3), shift=(2, 1), heads=2, bias=True)
D30 = Case((9, 7), 30, torch.float32, window=(2, 2), partition="grid", heads=2, bias=True)
SHIFTED = Case((12, 10), 32, torch.float32, (8, 8), (4, 4), heads=2, bias=True)
POOLED = Case((7, 10), 48, torch.bfloat16, (4, 4), (2, 2), bias=True, pooled=True, batch=2)
WIDE_BIAS = Case((10, 9), 20, bias=True)  # the gradient of its table sums several tiles of keys
MANY = Case((13, 5), 32, heads=32, batch=16)  # so many blocks that each takes several row tiles
SQUARE = replace(SHIFTED, dtype=torch.float16, shift=(0, 0))
CASES = [
    Case((16, 12), 64, torch.float16),
    Case((19, 15), 32, torch.bfloat16),  # more keys than one tile of 256
    SHIFTED,
    SQUARE,
    D20,
    D30,
    replace(D30, dtype=torch.bfloat16, window=(3, 2), bias=False),
    Case((8, 8), 64, torch.float32, (4, 4), pooled=True),
    POOLED,
    Case((6, 5), 80, torch.float32, (8, 8), (4, 0), bias=True),  # one window, larger than the map
    Case((9, 9), 80, torch.float16, (3, 9), scale=0.3),
    Case((9, 5), 72, torch.bfloat16, (4, 3), (1, 2), pooled=True),
    Case((7, 6), 128, torch.float32),
    Case((7, 6), 128, torch.float16, (4, 4), (1, 3), bias=True),
    Case((13, 8), 128, torch.bfloat16),
    WIDE_BIAS,
    MANY,
    Case((1, 1), 1, torch.float16),
    Case((4, 4), 16, torch.float16, batch=0),
]


@pytest.fixture(scope="module")
def module() -> Path:
    return build.extension()


def poisoned(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, float("nan"))


def workspaces(module: Path, case: Case) -> tuple[Tensor, Tensor]:
    """Of the forward and the backward, poisoned."""
    args = (case.shape, DTYPES.index(case.dtype))
    sizes = run(
        module,
        [
            Call("cuda_window_attention_forward_workspace", args),
            Call("cuda_window_attention_backward_workspace", [*args, case.bias]),
        ],
    )
    forward, backward = (torch.full((s.value,), 0xFF, dtype=torch.uint8) for s in sizes)
    return forward, backward


def forward_call(case: Case, workspace: Tensor) -> Call:
    qkv, table, grad = case.tensors
    lse = torch.full((case.batch, case.heads, *case.size), float("nan"))
    bias = 0 if table is None else table
    args = [qkv, bias, poisoned(grad), lse, workspace, case.shape, DTYPES.index(case.dtype), 0]
    return Call("cuda_window_attention_forward", args)


def backward_call(case: Case, workspace: Tensor, out: Tensor, lse: Tensor) -> Call:
    qkv, table, grad = case.tensors
    bias, grad_bias = (0, 0) if table is None else (table, poisoned(table))
    args = [grad, qkv, bias, out, lse, poisoned(qkv), grad_bias, workspace]
    return Call("cuda_window_attention_backward", [*args, case.shape, DTYPES.index(case.dtype), 0])


def with_seeds(call: Call, seeds: range, **settings: object) -> list[Call]:
    return [Call(call.function, call.args, {"seed": seed, **settings}) for seed in seeds]


def run_deterministic(module: Path, call: Call, seeds: range, **settings: object) -> list[Tensor]:
    """What the call leaves in its arguments: the same with every seed."""
    results = run(module, with_seeds(call, seeds, **settings))
    first, *others = (result.args for result in results)
    assert all(same(first, other) for other in others)
    return first


def check(module: Path, case: Case, seeds: range = range(2), **settings: object) -> None:
    forward_workspace, backward_workspace = workspaces(module, case)
    forward = forward_call(case, forward_workspace)
    qkv, _, out, lse, *_ = run_deterministic(module, forward, seeds, **settings)
    assert torch.equal(qkv, case.tensors[0])
    backward = backward_call(case, backward_workspace, out, lse)
    *inputs, grad_qkv, grad_bias, _, _, _, _ = run_deterministic(
        module, backward, seeds, **settings
    )
    assert same(inputs, backward.args[:5])

    got = [out, grad_qkv, grad_bias] if case.bias else [out, grad_qkv]
    eager, exact = case.reference(case.dtype), case.reference(torch.float64)
    for name, a, b, c in zip(("out", "grad_qkv", "grad_bias"), got, eager, exact, strict=False):
        assert_parity(a, b, c, name, case.dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case, module: Path) -> None:
    check(module, case)


def test_shared_memory_of_the_smallest_gpu(module: Path) -> None:
    """The bias table of a window much larger than the map: sm_86 has 99 KiB a block."""
    case = Case((8, 8), 128, window=(21, 21), bias=True)
    check(module, case, range(2), shared_limit=99 << 10)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [20, 30, 32, 48, 64, 80, 128])
@pytest.mark.parametrize("case", [D20, SHIFTED, D30, POOLED], ids=str)
def test_parity_in_full(case: Case, head_dim: int, dtype: torch.dtype, module: Path) -> None:
    check(module, replace(case, head_dim=head_dim, dtype=dtype), range(8))


# Together they pass every barrier with something at stake; the slow one comes last.
BARRIER_CASES = [SQUARE, POOLED, WIDE_BIAS, D30, Case((19, 15), 32, torch.bfloat16), MANY]


@pytest.fixture(scope="module")
def right(module: Path) -> Right:
    """The calls of BARRIER_CASES and what they leave when nothing is left out."""
    calls = []
    for case in BARRIER_CASES:
        forward_workspace, backward_workspace = workspaces(module, case)
        forward = forward_call(case, forward_workspace)
        after = run(module, [forward])[0].args
        backward = backward_call(case, backward_workspace, after[2], after[3])
        calls += [(forward, after), (backward, run(module, [backward])[0].args)]
    return calls


@pytest.mark.parametrize("barrier", barriers("window_attention", "__syncthreads"))
def test_removed_barrier_is_caught(barrier: str, module: Path, right: Right) -> None:
    check_removal(barrier, module, right, seeds=(0, 1))


@pytest.mark.full
@pytest.mark.parametrize(
    "barrier", barriers("window_attention", "__syncwarp", "cp_async_commit", "cp_async_wait")
)
def test_removed_wait_is_caught(barrier: str, module: Path, right: Right) -> None:
    check_removal(barrier, module, right, seeds=(0, 1))
