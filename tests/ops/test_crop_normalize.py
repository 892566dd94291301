"""crop_normalize: every backend against the reference, and the reference against OpenCV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kernelpose
from kernelpose.backend import OPS, TRITON_INTERPRETED
from kernelpose.data.images import read_image
from kernelpose.ops import crop_normalize
from kernelpose.reference.crop_normalize import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    box_to_center_scale,
    crop_image,
    normalize,
    warp_matrix,
)
from tests.ops.checks import device_for

Pair = tuple[int, int]
Result = tuple[Tensor, Tensor, Tensor]

KERNELS = [name for name in OPS["crop_normalize"].dtypes if name != "eager"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


@dataclass(frozen=True)
class Case:
    """Persons on noise, the hardest picture there is: no two neighbours alike."""

    size: Pair
    images: tuple[Pair, ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    index: tuple[int, ...]
    rotation: tuple[float, ...] | None = None
    batched: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        images: Any = [noise(*size, 3).to(device) for size in self.images]
        if self.batched:
            images = torch.stack(images)
        boxes = torch.tensor(self.boxes, device=device, dtype=torch.float64).view(-1, 4)
        index = torch.tensor(self.index, device=device, dtype=torch.int64)
        options = {"size": self.size, **self.options}
        if self.rotation is not None:
            options["rotation"] = torch.tensor(self.rotation, device=device)
        return (images, boxes, index), options

    def run(self, backend: str | None, device: str = "cpu", **more: Any) -> Result:
        args, options = self.arguments(device)
        return crop_normalize(*args, **{**options, **more, "backend": backend})


INSIDE = (20.0, 15.0, 20.0, 40.0)
BEYOND = (-9.5, -3.0, 30.0, 90.0)  # past two corners
AWAY = (1e4, 20.0, 5.0, 5.0)
SHAPES = ((75, 80), (31, 64), (90, 57))

CASES = {
    "sizes": Case((64, 48), SHAPES, (INSIDE, BEYOND, AWAY, INSIDE), (0, 1, 2, 2)),
    "batch": Case((32, 24), ((75, 80),) * 3, (INSIDE, BEYOND, INSIDE), (2, 0, 1), batched=True),
    "rotated": Case(
        (64, 48), SHAPES, (INSIDE, BEYOND, INSIDE, BEYOND), (0, 1, 2, 0), (30.0, -75.0, 180.0, 1.0)
    ),
    "plain": Case((32, 48), SHAPES, (INSIDE, BEYOND), (2, 0), options={"udp": False}),
    "plain-rotated": Case(
        (24, 17), SHAPES, (INSIDE, BEYOND), (1, 0), (12.0, 200.0), options={"udp": False}
    ),
    "one-pixel-image": Case((7, 5), ((1, 1), (1, 9), (9, 1)), ((0, 0, 1, 1),) * 3, (0, 1, 2)),
    "two-wide-image": Case((9, 33), ((4, 2), (3, 3)), ((0, 0, 2, 4), (0, 0, 3, 3)), (0, 1)),
    "seven-by-five": Case((7, 5), SHAPES[:1], (INSIDE, BEYOND), (0, 0), (0.0, 45.0)),
    "magnified": Case((40, 70), SHAPES, ((30.2, 40.7, 3.0, 2.0),), (0,)),
    "shrunk": Case((8, 8), SHAPES, ((-300.0, -300.0, 700.0, 700.0),), (0,)),
    "numbers": Case(
        (16, 12), SHAPES, (INSIDE,), (1,),
        options={"mean": (0.1, 0.5, 0.9), "std": (1.0, 0.5, 0.25), "padding": 0.8},
    ),
    "one-row": Case((1, 9), SHAPES, (INSIDE,), (0,), options={"udp": False}),
    "nobody": Case((8, 6), SHAPES, (), ()),
    "no-images": Case((8, 6), (), (), ()),
}  # fmt: skip


def check(got: Result, expected: Result, dtype: torch.dtype, std: Sequence[float]) -> None:
    """The same crops, but for a grey level in at most one number of a thousand.

    The coordinates are the same float32 numbers on every backend, but a value between pixels is
    rounded in an order that PyTorch's lerp leaves open (a multiply-add or two steps). Where the
    exact value lies halfway between two levels, its last bit decides which of them it becomes.
    """
    for name, a, b in zip(("crops", "centers", "scales"), got, expected, strict=True):
        assert (a.shape, a.device, a.requires_grad) == (b.shape, b.device, False), name
        assert not a.isnan().any(), name
    assert got[0].dtype == dtype and got[1].dtype == got[2].dtype == torch.float32
    # A GPU divides by a number as it multiplies by its inverse.
    exact = got[1].device.type == "cpu"
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0 if exact else None, atol=0 if exact else None)
    if got[0].numel() == 0:
        return
    grey = 255 * torch.tensor(std, device=got[0].device).view(3, 1, 1)
    difference = (got[0].float() - expected[0].float()).abs()
    # One ULP of the crops' dtype at the largest of them; of float32 four, as it is computed with.
    ulp = torch.finfo(dtype).eps * expected[0].float().abs().max()
    rounding = ulp * (4 if dtype == torch.float32 else 1)
    assert ((difference - rounding) * grey).max() <= 1.01
    assert (difference > rounding).float().mean() <= 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_parity(name: str, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    case, device = CASES[name], device_for(backend)
    if backend == "triton" and TRITON_INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("triton: its interpreter computes bfloat16 wrongly")
    got, expected = (case.run(b, device, dtype=dtype) for b in (backend, "eager"))
    check(got, expected, dtype, case.options.get("std", IMAGENET_STD))


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_photographs_crop_as_in_opencv(shared: Path, backend: str) -> None:
    device = device_for(backend)
    with np.load(shared / "golden" / "topdown_coco.npz") as golden:
        expected = golden["crop_bgr_uint8"][..., ::-1].astype(np.float64)
        count = len(expected)
        boxes, files = golden["box_xywh"][:count], golden["image_file"][:count]
        geometry = golden["center"][:count], golden["scale_px_wh"][:count]
    names = sorted(set(files))
    folder = shared / "samples" / "coco" / "val2017"
    images = [torch.from_numpy(read_image(folder / name)).to(device) for name in names]
    index = torch.tensor([names.index(name) for name in files], device=device)
    boxes = torch.from_numpy(boxes).to(device)
    crops, *found = crop_normalize(images, boxes, index, size=(256, 192), backend=backend)
    for got, exact in zip(found, geometry, strict=True):
        np.testing.assert_allclose(got.cpu().numpy(), exact, rtol=1e-6)
    mean, std = (
        torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    levels = ((crops * std + mean) * 255).round().permute(0, 2, 3, 1).cpu().numpy()
    difference = np.abs(levels - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3


@pytest.mark.parametrize("udp", [True, False])
def test_reference_is_warp_and_normalisation(udp: bool) -> None:
    """Person by person, with the functions that the data sets use."""
    case = CASES["rotated"]
    (images, boxes, index), options = case.arguments("cpu")
    crops, centers, scales = crop_normalize(
        images, boxes, index, **options, udp=udp, backend="eager"
    )
    for i in range(len(boxes)):
        center, scale = box_to_center_scale(boxes[[i]], case.size)
        assert torch.equal(centers[[i]], center) and torch.equal(scales[[i]], scale)
        rotation = options["rotation"][[i]]
        matrix = warp_matrix(center, scale, case.size, rotation=rotation, udp=udp)
        crop = crop_image(images[index[i]], matrix, case.size)
        torch.testing.assert_close(crops[[i]], normalize(crop), rtol=0, atol=0)


def test_automatic_choice() -> None:
    for name in ("sizes", "no-images"):
        for a, b in zip(CASES[name].run(None), CASES[name].run("cpu"), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", KERNELS)
def test_strides(backend: str) -> None:
    """Planes, a transposed image, a window into a larger one, bytes between the pixels."""
    device = device_for(backend)
    images = [noise(40, 30, 3).to(device) for _ in range(4)]
    wide = torch.zeros(50, 40, 5, dtype=torch.uint8, device=device)
    wide[3:43, 4:34, 1:4] = images[2]
    views = [
        images[0].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        images[1].transpose(0, 1).contiguous().transpose(0, 1),
        wide[3:43, 4:34, 1:4],
        torch.cat((images[3], images[3]), 1)[:, 30:],
    ]
    assert not any(view.is_contiguous() for view in views)
    boxes = torch.tensor([[-3.0, 4.0, 20.0, 30.0]], device=device).repeat(4, 1)
    index = torch.arange(4, device=device)
    expected = crop_normalize(images, boxes, index, size=(16, 12), backend=backend)
    got = crop_normalize(views, boxes, index, size=(16, 12), backend=backend)
    assert torch.equal(got[0], expected[0])
    planes = torch.stack(images).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    got = crop_normalize(planes, boxes, index, size=(16, 12), backend=backend)
    assert torch.equal(got[0], expected[0])
    skipped = boxes.repeat_interleave(2, 0)[::2], index.repeat_interleave(2)[::2]
    got = crop_normalize(images, *skipped, size=(16, 12), backend=backend)
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_boxes_of_any_dtype_and_without_gradient(backend: str) -> None:
    (images, boxes, index), options = CASES["sizes"].arguments("cpu")
    boxes = boxes.round()
    expected = crop_normalize(images, boxes, index, **options, backend=backend)
    for given in (boxes.float().requires_grad_(), boxes.int()):
        got = crop_normalize(images, given, index, **options, backend=backend)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b) and not a.requires_grad


NAN, INF = float("nan"), float("inf")
UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"box": (5.0, 5.0, NAN, 5.0)}, r"boxes\[1\] is \[5\.0, 5\.0, nan, 5\.0\]"),
    "inf": ({"box": (INF, 5.0, 5.0, 5.0)}, r"boxes\[1\] is \[inf,"),
    "no-width": ({"box": (5.0, 5.0, 0.0, 5.0)}, r"boxes\[1\] is .*; expected finite"),
    "negative": ({"box": (5.0, 5.0, 5.0, -5.0)}, r"boxes\[1\] is .*positive"),
    "tiny": ({"box": (5.0, 5.0, 1e-7, 1e-7)}, r"boxes\[1\] is .*too small"),
    "huge": ({"box": (0.0, 0.0, 1e39, 1e39)}, r"boxes\[1\] is .*too large"),
    "far": ({"box": (1e12, 0.0, 5.0, 5.0)}, r"boxes\[1\] is .*too large"),
    "index": ({"index": 3}, r"image_index\[1\] is 3; expected 0 to 2\."),
    "negative-index": ({"index": -1}, r"image_index\[1\] is -1; expected 0 to 2\."),
    "rotation": ({"rotation": NAN}, r"rotation\[1\] is nan; expected degrees\."),
}


def unusable(name: str, device: str) -> tuple[list[Tensor], Tensor, Tensor, Tensor | None]:
    change, _ = UNUSABLE[name]
    (images, boxes, index), _ = CASES["sizes"].arguments(device)
    boxes, index = boxes[:3].clone(), index[:3].clone()
    boxes[1] = torch.tensor(change.get("box", INSIDE))
    index[1] = change.get("index", 0)
    rotation = None
    if "rotation" in change:
        rotation = torch.tensor([0.0, change["rotation"], 20.0], device=device)
    return images, boxes, index, rotation


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("name", UNUSABLE)
def test_what_has_no_crop_is_an_error_on_a_cpu(name: str, backend: str) -> None:
    images, boxes, index, rotation = unusable(name, "cpu")
    with pytest.raises(ValueError, match=UNUSABLE[name][1]):
        crop_normalize(images, boxes, index, size=(8, 6), rotation=rotation, backend=backend)


@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("name", UNUSABLE)
def test_what_has_no_crop_is_black_where_nobody_waits(name: str, backend: str) -> None:
    device = "cpu" if backend == "reference" else device_for(backend)
    images, boxes, index, rotation = unusable(name, device)
    if backend == "reference":  # as compiled code has it
        run = kernelpose.reference.crop_normalize.crop_normalize
        crops = run(images, boxes, index, rotation, (8, 6))[0]
    else:
        crops = crop_normalize(
            images, boxes, index, size=(8, 6), rotation=rotation, backend=backend
        )[0]
    black = normalize(torch.zeros(3, 8, 6, dtype=torch.uint8, device=device))
    torch.testing.assert_close(crops[1], black)
    others = [0, 2]
    expected = crop_normalize(
        images, boxes[others], index[others], size=(8, 6),
        rotation=None if rotation is None else rotation[others], backend="eager",
    )  # fmt: skip
    torch.testing.assert_close(crops[others], expected[0])


def test_boxes_outside_the_picture_are_black() -> None:
    boxes = torch.tensor([AWAY, (-50.0, 0.0, 10.0, 10.0), (3.0, 3.0, 2.0, 2.0)])
    crops = crop_normalize(noise(1, 9, 9, 3), boxes, torch.zeros(3).long(), size=(8, 6))[0]
    black = normalize(torch.zeros(2, 3, 8, 6, dtype=torch.uint8))
    torch.testing.assert_close(crops[:2], black)
    assert (crops[2] > black[0] + 0.1).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_deterministic_whatever_the_threads(backend: str) -> None:
    device = device_for(backend)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(CASES["rotated"].run(backend, device)[0])
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("backend", KERNELS)
def test_inputs_are_never_written(backend: str) -> None:
    (images, boxes, index), options = CASES["rotated"].arguments(device_for(backend))
    inputs = [*images, boxes, index, options["rotation"]]
    copies = [x.clone() for x in inputs]
    crop_normalize(images, boxes, index, **options, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("name", ["rotated", "batch", "nobody"])
def test_opcheck(name: str) -> None:
    (images, boxes, index), options = CASES[name].arguments("cpu")
    stacked = [images] if isinstance(images, Tensor) else images
    args = (
        stacked, boxes, index, options.get("rotation"), list(CASES[name].size), 1.25,
        list(IMAGENET_MEAN), list(IMAGENET_STD), True, torch.float16, "cpu",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.kernelpose.crop_normalize.default, args)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("name", ["rotated", "batch", "nobody"])
def test_compiles_to_one_graph(name: str, backend: str) -> None:
    torch._dynamo.reset()
    (images, boxes, index), options = CASES[name].arguments("cpu")
    rotation = options.pop("rotation", None)

    def run(images: Any, boxes: Tensor, index: Tensor, rotation: Tensor | None) -> Result:
        given = {**options, "rotation": rotation, "backend": backend}
        return crop_normalize(images, boxes, index, **given)

    args = images, boxes, index, rotation
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*args)
    for a, b in zip(compiled, run(*args), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_kernel_refuses_what_has_no_crop() -> None:
    torch._dynamo.reset()
    images, boxes, index, _ = unusable("nan", "cpu")
    run = torch.compile(
        lambda boxes: crop_normalize(images, boxes, index, size=(8, 6), backend="cpu"),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(ValueError, match=r"boxes\[1\] is"):
        run(boxes)


class _Crop(torch.nn.Module):
    def forward(self, images: Tensor, boxes: Tensor, index: Tensor) -> Tensor:
        return crop_normalize(images, boxes, index, size=(16, 12), backend="cpu")[0]


def test_export() -> None:
    persons = torch.export.Dim("persons")
    args, _ = CASES["batch"].arguments("cpu")
    shapes = (None, {0: persons}, {0: persons})
    program = torch.export.export(_Crop(), args, dynamic_shapes=shapes)
    assert "kernelpose.crop_normalize" in program.graph_module.code
    more = (args[0], args[1].repeat(2, 1), args[2].repeat(2))
    torch.testing.assert_close(program.module()(*more), _Crop()(*more))


def test_autocast_and_inference_mode_change_nothing() -> None:
    expected = CASES["sizes"].run("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        cast = CASES["sizes"].run("cpu")
    with torch.inference_mode():
        inferred = CASES["sizes"].run("cpu")
    for a, b, c in zip(expected, cast, inferred, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


IMAGE, BOX, FIRST = noise(9, 9, 3), torch.tensor([[1.0, 1.0, 5.0, 5.0]]), torch.tensor([0])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"images": [IMAGE.float()]}, TypeError, r"images\[0\] is torch\.float32; expected"),
        ({"images": [IMAGE, IMAGE[None]]}, ValueError, r"images\[1\] has shape \(1, 9, 9, 3\)"),
        ({"images": IMAGE}, ValueError, r"images has shape \(9, 9, 3\); expected a batch"),
        ({"images": [IMAGE[:0]]}, ValueError, r"images\[0\] has shape \(0, 9, 3\)"),
        ({"images": [IMAGE[..., :1]]}, ValueError, r"images\[0\] has shape \(9, 9, 1\)"),
        ({"images": [3]}, TypeError, r"images\[0\] is int; expected a tensor"),
        ({"images": []}, ValueError, "images is empty; expected the images of 1 boxes"),
        ({"images": IMAGE[None][:0]}, ValueError, "images is empty"),
        ({"images": [IMAGE, IMAGE.to("meta")]}, ValueError, r"images\[1\] is on meta; expected"),
        ({"boxes": [[1, 1, 5, 5]]}, TypeError, "boxes is list; expected a tensor"),
        ({"boxes": BOX[0]}, ValueError, r"boxes has shape \(4,\); expected \(P, 4\)"),
        ({"boxes": BOX.bool()}, TypeError, "boxes is torch.bool; expected real numbers"),
        ({"boxes": BOX.to("meta")}, ValueError, "boxes is on meta; expected cpu, as images"),
        ({"image_index": FIRST.int()}, TypeError, "image_index is torch.int32; expected"),
        ({"image_index": FIRST[:0]}, ValueError, r"image_index has shape \(0,\); expected \(1,\)"),
        ({"image_index": 0}, TypeError, "image_index is int; expected a tensor"),
        ({"rotation": 30.0}, TypeError, "rotation is float; expected a tensor"),
        ({"rotation": FIRST}, TypeError, "rotation is torch.int64; expected floating-point"),
        ({"size": (0, 4)}, ValueError, r"size is \(0, 4\); expected .* each 2 to 32767, as UDP"),
        ({"size": (1, 4)}, ValueError, r"size is \(1, 4\)"),
        ({"size": 4}, ValueError, "size is 4; expected"),
        ({"size": (0, 4), "udp": False}, ValueError, "each 1 to 32767"),
        ({"padding": 0}, ValueError, "padding is 0; expected a positive number"),
        ({"padding": NAN}, ValueError, "padding is nan"),
        ({"mean": (0.5, 0.5)}, ValueError, r"mean is \(0\.5, 0\.5\); expected three"),
        ({"mean": 0.5}, TypeError, r"mean is 0\.5; expected three numbers"),
        ({"images": None}, TypeError, "images is NoneType; expected a list or a tensor"),
        ({"std": (1, 1, 0)}, ValueError, r"std is \(1, 1, 0\); expected positive"),
        ({"dtype": torch.float64}, TypeError, "dtype is torch.float64; expected"),
        ({"backend": "torch"}, kernelpose.BackendError, "crop_normalize has no torch backend"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(
    change: dict[str, Any], error: type[Exception], text: str
) -> None:
    given = {"images": [IMAGE], "boxes": BOX, "image_index": FIRST, "size": (8, 6), **change}
    args = [given.pop(name) for name in ("images", "boxes", "image_index")]
    with pytest.raises(error, match=text) as caught:
        crop_normalize(*args, **given)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
