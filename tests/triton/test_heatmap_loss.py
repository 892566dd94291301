"""heatmap_loss's Triton kernels against the reference in float64, and compiled ahead of time."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernelpose.triton_kernels import heatmap_loss as kernels
from torch import Tensor

from kernelpose.reference.heatmap_loss import TARGET_CODECS, pixel_ratio
from tests.ops.test_heatmap_loss import CASES, Case
from tests.parity import assert_parity
from tests.triton.aot import compile_all

# The interpreter computes bfloat16 wrongly; tests/ops has it where a GPU is.
DTYPES = [torch.float32, torch.float16]
GRAD_LOSS = 512.0  # a scaler's
MORE = {
    "tiles": Case((70, 40), (280, 160), batch=1, joints=4),  # more rows than a tile has
}


# NumPy's, about the window of a joint at infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def _run(case: Case, pred: Tensor, labels: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the Triton kernels."""
    ratio = pixel_ratio(case.input_size, case.size, udp=case.codec == "udp")
    given = (pred.detach(), *labels, *ratio, case.sigma, TARGET_CODECS.index(case.codec))
    grad_loss = torch.tensor(GRAD_LOSS, device=pred.device)
    return kernels.forward(*given), kernels.backward(grad_loss, *given)


def _reference(case: Case, pred: Tensor) -> tuple[Tensor, Tensor]:
    leaf = pred.detach().requires_grad_()
    loss = case.run([leaf], "eager")
    return loss.detach(), torch.autograd.grad(loss * GRAD_LOSS, leaf)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n, c in (CASES | MORE).items() if c.batch * c.joints])
def test_parity(
    name: str, dtype: torch.dtype, interpreter: None, device: str, poisoned: None
) -> None:
    case = (CASES | MORE)[name]
    (pred,) = case.inputs(dtype, device)
    labels = case.labels(device)
    loss, gradient = _run(case, pred, labels)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    exact, eager = _reference(case, pred.double()), _reference(case, pred)
    assert_parity(loss, eager[0], exact[0], "loss")
    assert_parity(gradient, eager[1], exact[1], "gradient", dtype)
    assert torch.equal(pred, case.inputs(dtype, device)[0])
    for given, same in zip(labels, case.labels(device), strict=True):
        assert torch.equal(given.nan_to_num(7.0), same.nan_to_num(7.0))
    for first, again in zip((loss, gradient), _run(case, pred, labels), strict=True):
        assert torch.equal(first, again)


def test_more_maps_than_the_sum_takes_at_once(
    interpreter: None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["small"]
    (pred,) = case.inputs(torch.float32, device)
    monkeypatch.setattr(kernels, "SUM_BLOCK", 4)
    loss, _ = _run(case, pred, case.labels(device))
    torch.testing.assert_close(loss, case.run([pred], "eager").detach())


def test_maps_that_do_not_count_are_not_read(interpreter: None, device: str) -> None:
    case = CASES["small"]
    (pred,) = case.inputs(torch.float32, device)
    keypoints, visible = case.labels(device)
    visible[:, 1] = 0
    clean = _run(case, pred, (keypoints, visible))
    pred.detach()[:, 1] = torch.nan
    assert all(map(torch.equal, _run(case, pred, (keypoints, visible)), clean))
    assert clean[0].isfinite() and not clean[1][:, 1].any()


def _variant(name: str, dtype: str, arch: int, constants: dict[str, Any]) -> dict[str, Any]:
    floats = ("ratio_x", "ratio_y", "radius", "half", "exponent", "factor")
    types = dict.fromkeys(floats, "fp32")
    types |= dict.fromkeys(("grad_loss", "keypoints", "visible", "sums", "loss"), "*fp32")
    return {
        "name": f"_heatmap_loss_{name}_kernel",
        "module": "heatmap_loss",
        "dtype": dtype,
        "arch": arch,
        "constants": constants,
        "options": {"num_warps": kernels.WARPS},
        "types": types | {"pred": f"*{dtype}", "grad_pred": f"*{dtype}"},
    }


def test_compiles_within_its_budget() -> None:
    """Every codec on ViTPose's maps, and maps of other widths, for both architectures."""
    usual = (64, 48)
    variants = [
        _variant(name, dtype, arch, {"CODEC": codec} | kernels.tile(*size, element_size))
        for name, (dtype, element_size), arch, codec, size in itertools.product(
            ("forward", "backward"),
            (("fp32", 4), ("fp16", 2), ("bf16", 2)),
            (80, 90),
            range(len(TARGET_CODECS)),
            (usual, (64, 44), (64, 47), (3, 150), (7, 1)),
        )
        if size == usual or (dtype != "bf16" and codec == 0)
    ]
    variants += [_variant("sum", "fp32", arch, {"BLOCK": kernels.SUM_BLOCK}) for arch in (80, 90)]
    used = compile_all(variants)
    assert len(used) == len(variants)
    for variant, usage in zip(variants, used, strict=True):
        assert usage["registers"] <= kernels.REGISTERS, (variant, usage)
        assert usage["spilled"] == 0 and usage["shared"] <= 1024, (variant, usage)
