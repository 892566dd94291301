"""decode_heatmap's Triton kernel against the reference, and compiled ahead of time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from kernelpose.triton_kernels import decode_heatmap as kernels
from torch import Tensor

from kernelpose.ops import decode_heatmap
from kernelpose.reference.decode_heatmap import DECODE_MODES, blur_weights
from tests.ops.test_decode_heatmap import CASES, EXACT, OUTSHONE, outshone_map, special_maps
from tests.parity import assert_parity
from tests.triton.aot import compile_all


def _run(inputs: list[Tensor], mode: str, kernel: int = 11, udp: bool = True) -> Tensor:
    """(P, K, 3): keypoints and scores."""
    heatmaps, *crops = inputs
    outputs = [heatmaps.new_full((*heatmaps.shape[:2], *n), torch.nan).float() for n in ((2,), ())]
    weights = blur_weights(mode, kernel)
    kernels.forward(heatmaps, *(crops or (None, None)), *outputs, mode, weights, udp)
    return torch.cat((outputs[0], outputs[1][..., None]), -1)


# The interpreter computes bfloat16 wrongly; tests/ops has it where a GPU is.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.persons and case.joints])
def test_parity(name: str, dtype: torch.dtype, interpreter: None, device: str) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype, device)
    got, expected = _run(inputs, case.mode, case.kernel, case.udp), case.run(inputs, "eager")
    assert_parity(got, expected, case.exact([inputs[0].float(), *inputs[1:]]))
    assert torch.equal(got[..., 2], expected[..., 2])
    assert all(torch.equal(a, b) for a, b in zip(inputs, case.inputs(dtype, device), strict=True))


@pytest.mark.parametrize("mode", DECODE_MODES)
def test_special_maps(mode: str, interpreter: None, device: str) -> None:
    maps = special_maps().to(device)
    got = _run([maps], mode)
    points, scores = decode_heatmap(maps, mode=mode, backend="eager")
    assert torch.equal(got[..., 2], scores)
    torch.testing.assert_close(got[..., :2], points, rtol=0, atol=0 if mode in EXACT else 2e-4)


@pytest.mark.parametrize("mode", OUTSHONE)
def test_a_faint_peak_beside_a_broad_hill(mode: str, interpreter: None, device: str) -> None:
    assert _run([outshone_map(mode).to(device)], mode)[0, 0, :2].tolist() == [35.0, 30.0]


def _check_budget(modes: Sequence[str], dtypes: Sequence[str]) -> None:
    """For both architectures; float32 without crops."""
    floats = dict.fromkeys(("span_x", "span_y"), "fp32")
    floats |= dict.fromkeys(("centers", "scales", "keypoints", "scores"), "*fp32")
    no_crops = {"centers": None, "scales": None}
    variants = [
        {
            "name": "_decode_heatmap_kernel",
            "module": "decode_heatmap",
            "dtype": dtype,
            "arch": arch,
            "constants": {
                "MODE": mode,
                "WEIGHTS": blur_weights(mode, 11),
                "TAPS": 1 if mode in EXACT else 16,
                "BLOCK": kernels.BLOCK,
                "TILE": kernels.TILE,
                **(no_crops if dtype == "fp32" else {}),
            },
            "options": kernels.OPTIONS,
            "types": floats | {"heatmaps": f"*{dtype}"},
        }
        for mode, dtype, arch in itertools.product(modes, dtypes, (80, 90))
    ]
    used = compile_all(variants)
    assert len(used) == len(variants)
    for usage, variant in zip(used, variants, strict=True):
        assert usage["registers"] <= kernels.REGISTERS, (usage, variant)
        assert usage["spilled"] == 0 and usage["shared"] <= 1024, (usage, variant)


def test_compiles_within_its_budget() -> None:
    _check_budget(["mmpose1", "dark"], ["fp32", "fp16"])


@pytest.mark.full
def test_every_mode_compiles_within_its_budget() -> None:
    _check_budget(DECODE_MODES, ["fp32", "fp16", "bf16"])
