"""csrc/cuda/decode_simcc.cu on the emulator, against the reference."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernelpose.reference.decode_simcc import decode_simcc
from tests.emulator import build
from tests.emulator.run import Call, EmulatorError, run
from tests.ops.test_decode_simcc import CASES, SPECIAL
from tests.parity import assert_parity

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # by dtype code


@pytest.fixture(scope="module")
def module() -> Path:
    return build.extension()


def _call(inputs: list[Tensor], split_ratio: float, udp: bool, seed: int) -> Call:
    x, y = inputs[:2]
    outputs = [torch.full((*x.shape[:2], *n), torch.nan) for n in ((2,), ())]
    spans = [t.shape[2] / split_ratio - udp for t in (x, y)]
    shape = (*x.shape, y.shape[2], split_ratio, *spans)
    args = [x, y, *(inputs[2:] or (0, 0)), *outputs, shape, DTYPES.index(x.dtype), 0]
    return Call("cuda_decode_simcc", args, {"seed": seed})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.persons and c.joints])
def test_parity(name: str, dtype: torch.dtype, module: Path) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype)
    calls = [_call(inputs, case.split_ratio, case.udp, seed) for seed in range(2)]
    crops = inputs[2:] or [None, None]
    right = decode_simcc(inputs[0], inputs[1], *crops, case.split_ratio, case.udp)
    for result in run(module, calls):
        assert_parity(result.args[4], right[0], right[0], "points")
        assert torch.equal(result.args[5], right[1])
        assert all(torch.equal(result.args[i], x) for i, x in enumerate(inputs))


@pytest.mark.parametrize("padding", [0, 6, 300])
def test_logits_without_a_peak(padding: int, module: Path) -> None:
    rows = [torch.tensor([row[axis] for row in SPECIAL.values()])[None] for axis in range(2)]
    x, y = (torch.nn.functional.pad(row, (0, padding), value=-math.inf) for row in rows)
    result = run(module, [_call([x, y], 1.0, True, 0)])[0]
    assert result.args[4][0].tolist() == [list(row[2]) for row in SPECIAL.values()]
    assert result.args[5][0].tolist() == [row[3] for row in SPECIAL.values()]


def test_another_dtype_is_an_error(module: Path) -> None:
    args = [*_call(CASES["small"].inputs(torch.float32), 2.0, True, 0).args]
    args[7] = 3
    with pytest.raises(EmulatorError, match="check_cuda"):  # ASan ends where it throws
        run(module, [Call("cuda_decode_simcc", args)])
