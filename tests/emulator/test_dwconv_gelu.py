"""csrc/cuda/dwconv_gelu.cu on the emulator against the reference in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernelpose.reference.dwconv_gelu import dwconv_gelu
from tests.emulator import build
from tests.emulator.barriers import Right, barriers, check_removal
from tests.emulator.run import Call, EmulatorError, run
from tests.ops.test_dwconv_gelu import CASES, Case
from tests.parity import assert_parity

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # by dtype code
NAMES = ("small", "odd", "one-row", "one-column", "one-pixel", "two-rows")
MORE = {  # several blocks, the last ones in part, and strips of 4 and of 16 rows
    "blocks": Case(1, 40, (9, 19)),
    "odd-blocks": Case(1, 35, (6, 18)),
    "long-strips": Case(264, 8, (19, 1)),
}
STRIPS = {"long-strips": 16}  # 4 where blocks are few


@pytest.fixture(scope="module")
def module() -> Path:
    return build.extension()


def _calls(
    case: Case, dtype: torch.dtype, parts: int
) -> tuple[Call, Call, dict[torch.dtype, list[Tensor]]]:
    """Forward and backward, what they write poisoned, and what they have to write: out, and the
    gradients of x, weight and bias."""
    inputs = [t.detach() for t in case.inputs(dtype)]
    grad = torch.randn(case.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = {}
    for d in (dtype, torch.float64):
        leaves = [
            t.to(d if i == 0 or d == torch.float64 else t.dtype) for i, t in enumerate(inputs)
        ]
        leaves = [t.requires_grad_() for t in leaves]
        out = dwconv_gelu(*leaves, case.size)
        expected[d] = [out.detach(), *torch.autograd.grad(out, leaves, grad.to(d))]
    nothing = torch.full_like(grad, torch.nan)
    rest = ((case.batch, *case.size, case.channels), DTYPES.index(dtype), 0)
    partial = torch.full((parts, 10, case.channels), torch.nan)
    return (
        Call("cuda_dwconv_gelu_forward", [*inputs, nothing, *rest]),
        Call("cuda_dwconv_gelu_backward", [grad, *inputs, partial, nothing, *rest]),
        expected,
    )


def _parts(case: Case, name: str) -> int:
    (height, width), strip = case.size, STRIPS.get(name, 4)
    return case.batch * -(-height // strip) * -(-width // 16)


def _run_deterministic(module: Path, call: Call, read: int) -> list[Tensor]:
    """What the call leaves in its tensors, the same with every seed; it only reads the first."""
    results = run(module, [Call(call.function, call.args, {"seed": s}) for s in range(2)])
    first, other = ([t for t in r.args if isinstance(t, Tensor)] for r in results)
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[:read], call.args, strict=False))
    return first


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in (*NAMES, *MORE) for dtype in DTYPES if name not in STRIPS),
        *((name, torch.float16) for name in STRIPS),  # many threads
    ],
)
def test_parity(name: str, dtype: torch.dtype, module: Path) -> None:
    case = (CASES | MORE)[name]
    parts = _parts(case, name)
    shape = (case.batch, *case.size, case.channels)
    assert run(module, [Call("cuda_dwconv_gelu_parts", [shape])])[0].value == parts
    forward, backward, expected = _calls(case, dtype, parts)
    *_, out = _run_deterministic(module, forward, 3)
    *_, partial, grad_x = _run_deterministic(module, backward, 4)
    grad_weight = partial[:, :9].sum(0).t().reshape(-1, 1, 3, 3)
    got = (out, grad_x, grad_weight, partial[:, 9].sum(0))
    names = ("out", "gradient of x", "of weight", "of bias")
    for what, ours, eager, exact in zip(
        names, got, expected[dtype], expected[torch.float64], strict=True
    ):
        assert_parity(ours, eager, exact, what, dtype)


def test_other_dtypes_are_an_error(module: Path) -> None:
    forward, _, _ = _calls(CASES["small"], torch.float32, 2)
    args = [3 if i == 5 else a for i, a in enumerate(forward.args)]
    with pytest.raises(EmulatorError, match="check_cuda"):  # ASan ends where it throws
        run(module, [Call(forward.function, args)])


OWN = [b for b in barriers("dwconv_gelu", "__syncthreads") if b.startswith("dwconv_gelu")]


@pytest.fixture(scope="module")
def right(module: Path) -> Right:
    """A call that needs every barrier, and what it leaves when nothing is left out."""
    _, backward, _ = _calls(MORE["blocks"], torch.float16, _parts(MORE["blocks"], "blocks"))
    return [(backward, run(module, [backward])[0].args)]


@pytest.mark.parametrize("barrier", OWN)
def test_removed_barrier_is_caught(barrier: str, module: Path, right: Right) -> None:
    check_removal(barrier, module, right)
