"""decode_simcc's Triton kernel against the reference, and compiled ahead of time."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from kernelpose.triton_kernels import decode_simcc as kernels
from torch import Tensor

from kernelpose.reference.decode_simcc import decode_simcc
from tests.ops.test_decode_simcc import CASES, SPECIAL
from tests.parity import assert_parity
from tests.triton.aot import compile_all


def _run(inputs: list[Tensor], split_ratio: float, udp: bool) -> tuple[Tensor, Tensor]:
    x, y = inputs[:2]
    points, scores = (x.new_full((*x.shape[:2], *n), torch.nan).float() for n in ((2,), ()))
    spans = [t.shape[2] / split_ratio - udp for t in (x, y)]
    crops = inputs[2:] or [None, None]
    kernels.forward(x, y, *crops, points, scores, split_ratio, spans)
    return points, scores


# The interpreter computes bfloat16 wrongly; tests/ops has it where a GPU is.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.persons and case.joints])
def test_parity(name: str, dtype: torch.dtype, interpreter: None, device: str) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype, device)
    points, scores = _run(inputs, case.split_ratio, case.udp)
    crops = inputs[2:] or [None, None]
    expected = decode_simcc(*inputs[:2], *crops, case.split_ratio, case.udp)
    assert_parity(points, expected[0], expected[0])
    assert torch.equal(scores, expected[1])
    assert all(torch.equal(a, b) for a, b in zip(inputs, case.inputs(dtype, device), strict=True))


@pytest.mark.parametrize("padding", [0, 6, 600])
def test_logits_without_a_peak(padding: int, interpreter: None, device: str) -> None:
    rows = [torch.tensor([row[axis] for row in SPECIAL.values()])[None] for axis in range(2)]
    padded = [torch.nn.functional.pad(row, (0, padding), value=-math.inf) for row in rows]
    points, scores = _run([row.to(device) for row in padded], 1.0, True)
    assert points[0].tolist() == [list(row[2]) for row in SPECIAL.values()]
    assert scores[0].tolist() == [row[3] for row in SPECIAL.values()]


def test_compiles_within_its_budget() -> None:
    """For both architectures, with and without crops."""
    floats = dict.fromkeys(("split_ratio", "span_x", "span_y"), "fp32")
    floats |= dict.fromkeys(("centers", "scales", "points", "scores"), "*fp32")
    constants = {"BLOCK": kernels.BLOCK}
    variants = [
        {
            "name": "_decode_simcc_kernel",
            "module": "decode_simcc",
            "dtype": dtype,
            "arch": arch,
            "constants": constants | ({} if crops else {"centers": None, "scales": None}),
            "options": kernels.OPTIONS,
            "types": floats | {"x": f"*{dtype}", "y": f"*{dtype}"},
        }
        for dtype, arch, crops in itertools.product(
            ("fp32", "fp16", "bf16"), (80, 90), (True, False)
        )
    ]
    used = compile_all(variants)
    assert len(used) == len(variants)
    for usage in used:
        assert usage["registers"] <= kernels.REGISTERS, usage
        assert usage["spilled"] == 0 and usage["shared"] <= 1024, usage
