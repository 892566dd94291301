"""The Triton kernels of reduced_attention against the reference, and compiled ahead of time."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from kernelpose.triton_kernels import reduced_attention as kernels
from kernelpose.triton_kernels import window_attention_tiles as tiles
from torch import Tensor

from kernelpose.reference.reduced_attention import reduced_attention
from tests.ops.test_reduced_attention import CASES, Case
from tests.parity import assert_parity
from tests.triton.aot import compile_all
from tests.triton.cases import interpreted

# The interpreter computes bfloat16 wrongly; tests/ops has it where a GPU is.
DTYPES = [torch.float32, torch.float16]
NAMES = interpreted(CASES)
HEAD_DIMS = {16: 16, 32: 20, 64: 64, 128: 80}  # block_d -> the head width it is compiled for


def _run(case: Case, inputs: list[Tensor], grad: Tensor) -> tuple[list[Tensor], Tensor]:
    """out and the gradients of q and kv; lse."""
    q, kv = (x.detach() for x in inputs)
    out, grad_q, grad_kv = (torch.full_like(x, torch.nan) for x in (q, q, kv))
    lse = q.new_full((q.shape[0], case.heads, q.shape[1]), torch.nan, dtype=torch.float32)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    kernels.forward(q, kv, out, lse, case.heads, scale)
    kernels.backward(grad, q, kv, lse, grad_q, grad_kv, case.heads, scale)
    return [out, grad_q, grad_kv], lse


def _expected(case: Case, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = reduced_attention(*leaves, case.heads, case.scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_parity(name: str, dtype: torch.dtype, interpreter: None, device: str) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype, device)
    torch.manual_seed(1)
    grad = torch.randn_like(inputs[0])
    got, lse = _run(case, inputs, grad)
    eager = _expected(case, inputs, grad)
    exact = _expected(case, [t.double() for t in inputs], grad)
    for what, *three in zip(("out", "gradient of q", "of kv"), got, eager, exact, strict=True):
        assert_parity(*three, what, dtype)
    assert lse.isfinite().all()
    assert all(map(torch.equal, inputs, case.inputs(dtype, device)))
    assert all(map(torch.equal, got, _run(case, inputs, grad)[0]))


def test_lse_is_optional_and_the_logarithm_of_the_sum(interpreter: None, device: str) -> None:
    case = CASES["odd"]
    q, kv = (x.detach() for x in case.inputs(torch.float32, device))
    outs = [torch.full_like(q, torch.nan) for _ in range(2)]
    lse = q.new_full((q.shape[0], case.heads, q.shape[1]), torch.nan)
    kernels.forward(q, kv, outs[0], lse, case.heads, 0.3)
    kernels.forward(q, kv, outs[1], None, case.heads, 0.3)
    assert torch.equal(*outs)
    queries = q.unflatten(-1, (case.heads, -1)).transpose(1, 2)
    keys = kv.unflatten(-1, (2, case.heads, -1))[:, :, 0].permute(0, 2, 3, 1)
    expected = (0.3 * queries @ keys).logsumexp(-1) / math.log(2)
    torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-5)


def _variants(
    dtypes: dict[str, int], widths: list[int], archs: tuple[int, ...]
) -> list[tuple[tiles.Tile, dict[str, Any]]]:
    """Every tile of every kernel, and the keys that a tile holds at once or not."""
    runs = []
    for (dtype, size), width, arch in itertools.product(dtypes.items(), widths, archs):
        pointers = dict.fromkeys(("q", "kv", "out", "grad_out", "grad_q"), f"*{dtype}")
        types = pointers | dict.fromkeys(("lse", "delta", "grad_kv"), "*fp32") | {"scale": "fp32"}
        backward = {kernels.BACKWARD[size, width]}
        for kernel, used in (
            ("forward", {*tiles.FORWARD[size, width].values()}),
            ("queries", backward), ("keys", backward),
        ):  # fmt: skip
            for tile in sorted(used):
                for one_step in (True, False) if kernel == "queries" else (False,):
                    constants = {
                        "HEAD_DIM": HEAD_DIMS[width], "BLOCK_D": width,
                        "BLOCK": tile.block, "STEP": tile.step, "ONE_STEP": one_step,
                    }  # fmt: skip
                    variant = {
                        "name": f"_reduced_attention_{kernel}_kernel",
                        "module": "reduced_attention",
                        "dtype": dtype,
                        "arch": arch,
                        "constants": constants,
                        "options": tiles.launch_options(tile),
                        "types": types,
                    }
                    runs.append((tile, variant))
    return runs


def _check(runs: list[tuple[tiles.Tile, dict[str, Any]]]) -> None:
    used = compile_all([variant for _, variant in runs])
    faults = []
    for (tile, variant), usage in zip(runs, used, strict=True):
        within = usage["registers"] <= tile.registers and usage["shared"] <= tile.shared
        if usage["spilled"] or not within:
            faults.append(f"{variant['name']} {variant['constants']} {tile}: {usage}")
    assert not faults, "\n".join(faults)


def test_compiles_within_its_budget() -> None:
    """PVT v2's heads in float16, on the newer architecture."""
    _check(_variants({"fp16": 2}, [64], (90,)))


@pytest.mark.full
@pytest.mark.parametrize("width", HEAD_DIMS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_tile_compiles_within_its_budget(dtype: str, width: int) -> None:
    _check(_variants({dtype: 4 if dtype == "fp32" else 2}, [width], (80, 90)))
