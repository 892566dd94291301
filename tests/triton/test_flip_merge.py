"""flip_merge's Triton kernel against the reference, and compiled ahead of time."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernelpose.triton_kernels import flip_merge as kernels

from kernelpose.reference.flip_merge import flip_merge
from tests.ops.test_flip_merge import CASES
from tests.triton.aot import compile_all


# The interpreter computes bfloat16 wrongly; tests/ops has it where a GPU is.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if 0 not in case.shape])
def test_equal_to_the_reference(
    name: str, dtype: torch.dtype, interpreter: None, device: str
) -> None:
    case = CASES[name]
    heatmaps, flipped = case.inputs(dtype, device)
    order = torch.randperm(case.shape[1], generator=torch.Generator().manual_seed(0)).tolist()
    out = torch.full_like(heatmaps, torch.nan)
    kernels.forward(heatmaps, flipped, out, order, case.shift)
    assert torch.equal(out, flip_merge(heatmaps, flipped, order, case.shift))
    assert all(
        torch.equal(*pair)
        for pair in zip((heatmaps, flipped), case.inputs(dtype, device), strict=True)
    )


def test_compiles_within_its_budget() -> None:
    """COCO's joints and the most that there may be, for both architectures."""
    coco = [0, *(i + (1 if i % 2 else -1) for i in range(1, 17))]
    orders = (coco, [*range(1, 1024), 0])
    variants = [
        {
            "name": "_flip_merge_kernel",
            "module": "flip_merge",
            "dtype": dtype,
            "arch": arch,
            "constants": {"ORDER": order, "SHIFT": shift, "BLOCK": kernels.BLOCK},
            "options": kernels.OPTIONS,
            "types": dict.fromkeys(("heatmaps", "flipped", "out"), f"*{dtype}"),
        }
        for dtype, arch, order, shift in itertools.product(
            ("fp32", "fp16", "bf16"), (80, 90), orders, (False, True)
        )
        if order is coco or (dtype, shift) == ("fp16", True)
    ]
    used = compile_all(variants)
    assert len(used) == len(variants)
    for usage in used:
        assert usage["registers"] <= kernels.REGISTERS, usage
        assert usage["spilled"] == usage["shared"] == 0, usage
