"""csrc/cuda/flip_merge.cu on the emulator, against the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernelpose.reference.flip_merge import flip_merge
from tests.emulator import build
from tests.emulator.run import Call, EmulatorError, run

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # by dtype code
SHAPES = [
    (2, 5, 3, 16),  # whole vectors of either size
    (1, 3, 4, 12),  # of float32 alone
    (2, 4, 3, 7),
    (1, 2, 1, 8),  # one vector a row
    (1, 2, 48, 64),  # several blocks a map in float32, the last of them in part
    (1, 2, 64, 48),
    (3, 3, 5, 1),
    (1, 133, 1, 8),
]


@pytest.fixture(scope="module")
def module() -> Path:
    return build.extension()


def _call(shape: tuple[int, ...], dtype: torch.dtype, shift: bool) -> tuple[Call, torch.Tensor]:
    """The call, and what it has to write."""
    generator = torch.Generator().manual_seed(0)
    heatmaps, flipped = torch.randn(2, *shape, generator=generator).to(dtype).unbind()
    order = torch.randperm(shape[1], generator=generator).tolist()
    maps = (shape[0] * shape[1], shape[2], shape[3], shift)
    out = torch.full_like(heatmaps, torch.nan)
    args = [heatmaps, flipped, out, order, maps, DTYPES.index(dtype), 0]
    return Call("cuda_flip_merge", args), flip_merge(heatmaps, flipped, order, shift)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_to_the_reference(dtype: torch.dtype, shift: bool, module: Path) -> None:
    calls, expected = zip(*(_call(shape, dtype, shift) for shape in SHAPES), strict=True)
    for call, right, result in zip(calls, expected, run(module, calls), strict=True):
        assert torch.equal(result.args[2], right), tuple(right.shape)
        assert all(torch.equal(result.args[i], call.args[i]) for i in range(2))


@pytest.mark.parametrize(
    ("position", "value"),
    [(3, [0] * 1025), (4, (1, 2**15, 2**15, False)), (5, 3)],
    ids=["joints", "pixels", "dtype"],
)
def test_what_it_cannot_do_is_an_error(position: int, value: object, module: Path) -> None:
    call, _ = _call((1, 3, 2, 8), torch.float32, False)
    args = [*call.args]
    args[position] = value
    with pytest.raises(EmulatorError, match="check_cuda"):  # ASan ends where it throws
        run(module, [Call(call.function, args)])
