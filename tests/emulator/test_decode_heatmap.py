"""csrc/cuda/decode_heatmap.cu on the emulator, against the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernelpose.ops import decode_heatmap
from kernelpose.reference.decode_heatmap import DECODE_MODES, blur_weights
from tests.emulator import build
from tests.emulator.barriers import barriers
from tests.emulator.run import Call, EmulatorError, Result, run
from tests.ops.test_decode_heatmap import CASES, EXACT, OUTSHONE, Case, outshone_map, special_maps
from tests.parity import assert_parity

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # by dtype code
KEYPOINTS, SCORES = 3, 4  # among the arguments


@pytest.fixture(scope="module")
def module() -> Path:
    return build.extension()


def call(
    inputs: list[Tensor], mode: str, kernel: int = 11, udp: bool = True, seed: int = 0
) -> Call:
    heatmaps, *crops = inputs
    keypoints = torch.full((*heatmaps.shape[:2], 2), torch.nan)
    outputs = [keypoints, keypoints[..., 0].clone()]
    weights = list(blur_weights(mode, kernel))
    problem = (*heatmaps.shape, DECODE_MODES.index(mode), udp, weights)
    args = [heatmaps, *(crops or (0, 0)), *outputs, problem, DTYPES.index(heatmaps.dtype), 0]
    return Call("cuda_decode_heatmap", args, {"seed": seed})


def of_case(case: Case, dtype: torch.dtype, seed: int = 0) -> Call:
    return call(case.inputs(dtype), case.mode, case.kernel, case.udp, seed)


def output(result: Result) -> Tensor:
    """(P, K, 3): keypoints and scores."""
    return torch.cat((result.args[KEYPOINTS], result.args[SCORES][..., None]), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.persons and c.joints])
def test_parity(name: str, dtype: torch.dtype, module: Path) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype)
    exact = case.exact([inputs[0].float(), *inputs[1:]])
    expected = case.run(inputs, "eager")
    results = run(module, [of_case(case, dtype, seed) for seed in range(2)])
    for result in results:
        got = output(result)
        assert_parity(got, expected, exact)
        assert torch.equal(got[..., 2], expected[..., 2])
        assert torch.equal(got, output(results[0]))
        assert all(torch.equal(result.args[i], x) for i, x in enumerate(inputs))


@pytest.mark.parametrize("mode", DECODE_MODES)
def test_special_maps(mode: str, module: Path) -> None:
    maps = special_maps()
    got = output(run(module, [call([maps], mode)])[0])
    points, scores = decode_heatmap(maps, mode=mode, backend="eager")
    assert torch.equal(got[..., 2], scores)
    torch.testing.assert_close(got[..., :2], points, rtol=0, atol=0 if mode in EXACT else 2e-4)


@pytest.mark.parametrize("mode", OUTSHONE)
def test_a_faint_peak_beside_a_broad_hill(mode: str, module: Path) -> None:
    got = output(run(module, [call([outshone_map(mode)], mode)])[0])
    assert got[0, 0, :2].tolist() == [35.0, 30.0]


def test_unaligned_maps(module: Path) -> None:
    """77 pixels: each map but the first starts in the middle of a vector."""
    maps = special_maps()[..., :7].repeat(1, 1, 2, 1)[:, :, :11]
    assert maps.shape[2] * maps.shape[3] % 2 == 1
    got = output(run(module, [call([maps], "argmax")])[0])
    points, scores = decode_heatmap(maps, mode="argmax", backend="eager")
    assert torch.equal(got, torch.cat((points, scores[..., None]), -1))


BARRIERS = [
    b for b in barriers("decode_heatmap", "__syncthreads", "__syncwarp") if b.startswith("decode")
]


@pytest.mark.parametrize("barrier", BARRIERS)
def test_removed_barrier_is_caught(barrier: str, module: Path) -> None:
    calls = [of_case(CASES["faint"], torch.float32, seed) for seed in (0, 1)]
    for given in calls:
        given.settings["skip"] = barrier
    with pytest.raises(EmulatorError):
        run(module, calls)


def test_another_dtype_is_an_error(module: Path) -> None:
    args = [*of_case(CASES["binomial"], torch.float32).args]
    args[-2] = 3
    with pytest.raises(EmulatorError, match="check_cuda"):  # ASan ends where it throws
        run(module, [Call("cuda_decode_heatmap", args)])
