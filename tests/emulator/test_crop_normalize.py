"""csrc/cuda/crop_normalize.cu on the emulator, against the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernelpose.ops.crop_normalize import image_set
from kernelpose.reference.crop_normalize import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    crop_normalize,
    normalize,
)
from tests.emulator import build
from tests.emulator.barriers import barriers
from tests.emulator.run import Call, EmulatorError, Result, run
from tests.ops.test_crop_normalize import CASES, UNUSABLE, Case, check, unusable

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # by dtype code
PEOPLED = {name: case for name, case in CASES.items() if case.boxes} | {
    # Its last tile of three is a part, which ends within a vector of either size.
    "tiles": Case((47, 51), CASES["sizes"].images, CASES["sizes"].boxes, (0, 1, 2, 2)),
}
CROPS, CENTERS, SCALES = 6, 7, 8  # among the arguments


@pytest.fixture(scope="module")
def module() -> Path:
    return build.extension()


def call(
    images: Any,
    boxes: Tensor,
    index: Tensor,
    dtype: torch.dtype,
    *,
    size: tuple[int, int],
    padding: float = 1.25,
    udp: bool = True,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    rotation: Tensor | None = None,
) -> Call:
    """The images of a list lie in one tensor: only what is an argument has an address there."""
    table: Any = 0
    if isinstance(images, Tensor):
        found, _ = image_set([images])
    else:
        flat = torch.cat([image.flatten() for image in images])
        starts = torch.tensor([0, *(image.numel() for image in images)]).cumsum(0)
        views = [
            flat[start:].as_strided(image.shape, image.stride(), int(start))
            for start, image in zip(starts, images, strict=False)
        ]
        found, table = image_set(views)
        images, table = flat, 0 if table is None else table
    turns: Any = 0
    if rotation is not None:
        angle = torch.deg2rad(rotation.double())
        turns = torch.stack((angle.cos(), angle.sin()), -1)
    crops = torch.full((len(boxes), 3, *size), torch.nan, dtype=dtype)
    centers, scales = torch.full((2, len(boxes), 2), torch.nan).unbind()
    shape = (len(boxes), *size, padding, udp, *mean, *std)
    args = [images, table, found, boxes, index, turns, crops, centers, scales, shape]
    return Call("cuda_crop_normalize", [*args, DTYPES.index(dtype), 0])


def of_case(case: Case, dtype: torch.dtype) -> Call:
    args, options = case.arguments("cpu")
    return call(*args, dtype, **options)


def outputs(result: Result) -> tuple[Tensor, Tensor, Tensor]:
    return result.args[CROPS], result.args[CENTERS], result.args[SCALES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(dtype: torch.dtype, module: Path) -> None:
    calls = [of_case(case, dtype) for case in PEOPLED.values()]
    for (name, case), given, result in zip(PEOPLED.items(), calls, run(module, calls), strict=True):
        expected = case.run("eager", dtype=dtype)
        check(outputs(result), expected, dtype, case.options.get("std", IMAGENET_STD))
        inputs = zip(given.args[:CROPS], result.args[:CROPS], strict=True)
        assert all(torch.equal(a, b) for a, b in inputs if isinstance(a, Tensor)), name


def test_planes_and_other_strides(module: Path) -> None:
    (images, boxes, index), options = CASES["batch"].arguments("cpu")
    expected = crop_normalize([*images], boxes, index, None, options["size"])
    planes = images.permute(0, 3, 1, 2).contiguous()
    given = call(images, boxes, index, torch.float32, **options)
    found, _ = image_set([planes.permute(0, 2, 3, 1)])
    given.args = [planes, 0, found, *given.args[3:]]
    check(outputs(run(module, [given])[0]), expected, torch.float32, IMAGENET_STD)


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_has_no_crop_is_black(name: str, module: Path) -> None:
    images, boxes, index, rotation = unusable(name, "cpu")
    given = call(images, boxes.double(), index, torch.float32, size=(8, 6), rotation=rotation)
    crops = run(module, [given])[0].args[CROPS]
    expected = crop_normalize(images, boxes, index, rotation, (8, 6))[0]
    torch.testing.assert_close(crops, expected)
    torch.testing.assert_close(crops[1], normalize(torch.zeros(3, 8, 6, dtype=torch.uint8)))


def test_same_on_every_schedule(module: Path) -> None:
    given = of_case(PEOPLED["tiles"], torch.float16)
    seeds = [Call(given.function, given.args, {"seed": seed}) for seed in range(4)]
    first, *others = (outputs(result) for result in run(module, seeds))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


OWN_BARRIERS = [b for b in barriers("crop_normalize", "__syncthreads") if b.startswith("crop")]


@pytest.mark.parametrize("barrier", OWN_BARRIERS)
def test_removed_barrier_is_caught(barrier: str, module: Path) -> None:
    given = of_case(PEOPLED["tiles"], torch.float32)
    with pytest.raises(EmulatorError):
        run(
            module, [Call(given.function, given.args, {"seed": s, "skip": barrier}) for s in (0, 1)]
        )


def test_a_dtype_that_it_does_not_have_is_an_error(module: Path) -> None:
    given = of_case(PEOPLED["batch"], torch.float32)
    with pytest.raises(EmulatorError, match="check_cuda"):  # ASan ends where it throws
        run(module, [Call(given.function, [*given.args[:-2], 3, 0])])
