"""crop_normalize's Triton kernel against the reference, and compiled ahead of time."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernelpose.triton_kernels import crop_normalize as kernels
from torch import Tensor

from kernelpose.ops.crop_normalize import Options
from kernelpose.reference.crop_normalize import IMAGENET_MEAN, IMAGENET_STD, crop_normalize
from tests.ops.test_crop_normalize import CASES, UNUSABLE, check, unusable
from tests.triton.aot import compile_all


def run(
    images: Any, boxes: Tensor, index: Tensor, rotation: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    stacked = [images] if isinstance(images, Tensor) else images
    op = torch.ops.kernelpose.crop_normalize
    result: tuple[Tensor, Tensor, Tensor] = op(stacked, boxes, index, rotation, *options, "triton")
    return result


# The interpreter computes bfloat16 wrongly; tests/ops has it where a GPU is.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.boxes])
def test_parity(
    name: str, dtype: torch.dtype, interpreter: None, device: str, poisoned: None
) -> None:
    case = CASES[name]
    args, given = case.arguments(device)
    rotation = given.pop("rotation", None)
    defaults = {"padding": 1.25, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "udp": True}
    options = Options(**{**defaults, **given, "dtype": dtype})
    expected = case.run("eager", device, dtype=dtype)
    check(run(*args, rotation, options), expected, dtype, options.std)


@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf - inf of such a box
def test_what_has_no_crop_is_black(name: str, interpreter: None, device: str) -> None:
    images, boxes, index, rotation = unusable(name, device)
    options = Options((8, 6), 1.25, IMAGENET_MEAN, IMAGENET_STD, True, torch.float32)
    crops = run(images, boxes, index, rotation, options)[0]
    expected = crop_normalize(images, boxes, index, rotation, *options)[0]
    torch.testing.assert_close(crops, expected)


def test_compiles_within_its_budget() -> None:
    """With and without a table and a rotation, for both architectures."""
    pointers = {"images": "*u8", "table": "*i64", "boxes": "*fp64", "image_index": "*i64"}
    pointers |= {"turns": "*fp64", "centers": "*fp32", "scales": "*fp32"}
    numbers = ["padding", "aspect", *(f"{n}_{c}" for n in ("factor", "offset") for c in "rgb")]
    absent: list[dict[str, None]] = [{}, {"table": None, "turns": None}]
    variants = [
        {
            "name": "_crop_normalize_kernel",
            "module": "crop_normalize",
            "dtype": dtype,
            "arch": arch,
            "constants": {"UDP": udp, "BLOCK": kernels.BLOCK, "STEPS": kernels.STEPS, **none},
            "options": kernels.launch_options(),
            "types": pointers | dict.fromkeys(numbers, "fp32") | {"crops": f"*{dtype}"},
        }
        for dtype, arch, udp, none in itertools.product(
            ("fp32", "fp16", "bf16"), (80, 90), (True, False), absent
        )
        if udp or dtype == "fp32"
    ]
    used = compile_all(variants)
    assert len(used) == len(variants)
    for usage in used:
        assert usage["registers"] <= kernels.REGISTERS, usage
        assert usage["spilled"] == usage["shared"] == 0, usage
