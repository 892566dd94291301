"""Boxes on images to the normalised batch that a pose model takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelpose import _native
from kernelpose.backend import OpSpec, choose
from kernelpose.backend import register as register_backends
from kernelpose.ops._register import is_plain, register
from kernelpose.reference.crop_normalize import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    box_to_center_scale,
    is_usable,
)
from kernelpose.reference.crop_normalize import crop_normalize as reference

Pair = tuple[int, int]
Result = tuple[Tensor, Tensor, Tensor]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Options(NamedTuple):
    """The arguments that are not tensors, in the order of the schema."""

    size: Pair
    padding: float
    mean: Sequence[float]
    std: Sequence[float]
    udp: bool
    dtype: torch.dtype


def crop_normalize(
    images: Tensor | Sequence[Tensor],
    boxes: Tensor,
    image_index: Tensor,
    *,
    size: Pair,
    padding: float = 1.25,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    udp: bool = True,
    rotation: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Result:
    """One crop a person, warped and normalised: all persons of all images in one launch.

    A box is grown to the aspect of `size` and by `padding`, mapped onto the crop (under UDP, arXiv
    1911.07524, its sides onto the outermost pixel centres), interpolated bilinearly with black
    outside the image, rounded to a grey level as cv2.warpAffine does, and normalised:
    ``(x / 255 - mean) / std``. Every backend computes the source coordinates in the same way, so
    their crops differ by one grey level, in at most one pixel of a thousand.

    Args:
        images: uint8 RGB, a list of (H, W, 3) of different sizes or one batch (N, H, W, 3), on one
            device. Of any strides: a CPU copies once what is not packed by pixels, a GPU reads it
            as it is. On a GPU a list of several costs one small copy from the host, and a CUDA
            graph cannot capture that; a batch, or a single image, costs none.
        boxes: (P, 4) as x, y, width, height in pixels, of any real dtype.
        image_index: (P,) int64, the image that each person is on.
        size: (height, width) of the crops; at least 2 x 2 under UDP.
        padding: factor on both sides of a box after its aspect is fixed.
        mean, std: a number for each of R, G, B, in units of 255 grey levels.
        udp: map pixel centre to pixel centre; else both axes by ``width / scale width``.
        rotation: (P,) degrees, or None; in the sense of `kernelpose.data.boxes.warp_matrix`.
        dtype: of the crops; float32, float16 or bfloat16.
        backend: "cuda", "triton", "cpu" or "eager"; None chooses, see `kernelpose.backend`.

    Returns:
        crops (P, 3, height, width) in `dtype`, centers (P, 2) and scales (P, 2) as (width, height),
        float32, in image pixels. Without gradient.

    A box that is not finite, has no area or cannot be cropped (a scale or a place beyond a billion
    pixels, a scale below a millionth), an image that does not exist and a rotation that is not
    finite are a ValueError on a CPU. A GPU would have to be waited for: there, and in compiled code
    that eager was chosen for, such a crop is black.

    Raises:
        ValueError: a shape, size or number does not fit. TypeError: a dtype does not.
        BackendError: the backend asked for cannot run this.
    """
    options = Options(size, padding, mean, std, udp, dtype)
    _check_options(options)
    stacked = _check_images(images, boxes)
    _check_persons(boxes, image_index, rotation, stacked[0].device)
    boxes = boxes.detach()
    rotation = None if rotation is None else rotation.detach()
    chosen = choose("crop_normalize", backend, stacked)
    plain = is_plain(*stacked, boxes, image_index, rotation)
    if chosen == "eager":
        single = [*stacked[0]] if stacked[0].ndim == 4 else stacked
        if plain and boxes.device.type == "cpu":
            _refuse_unusable(boxes, image_index, rotation, len(single), options)
        return reference(single, boxes, image_index, rotation, *options)
    result: Result = (_run if plain else _op)(
        stacked, boxes, image_index, rotation, *options, chosen
    )
    return result


def _check_images(images: Tensor | Sequence[Tensor], boxes: Tensor) -> list[Tensor]:
    """The images as a list of (H, W, 3), or of one batch (N, H, W, 3); for none one of a pixel."""
    if not isinstance(boxes, Tensor):
        raise TypeError(f"boxes is {type(boxes).__name__}; expected a tensor.")
    if isinstance(images, Tensor):
        stacked, form, dims = [images], "a batch (N, H, W, 3)", 4
    elif isinstance(images, Sequence):
        stacked, form, dims = [*images], "(H, W, 3)", 3
    else:
        raise TypeError(f"images is {type(images).__name__}; expected a list or a tensor.")
    for i, image in enumerate(stacked):
        name = "images" if dims == 4 else f"images[{i}]"
        if not isinstance(image, Tensor):
            raise TypeError(f"{name} is {type(image).__name__}; expected a tensor.")
        if image.dtype != torch.uint8:
            raise TypeError(f"{name} is {image.dtype}; expected torch.uint8.")
        if image.ndim != dims or image.shape[-1] != 3 or 0 in image.shape[-3:-1]:
            raise ValueError(
                f"{name} has shape {tuple(image.shape)}; expected {form}, H and W >= 1."
            )
        if image.device != stacked[0].device:
            raise ValueError(
                f"{name} is on {image.device}; expected {stacked[0].device}, as the first image."
            )
    if len(images) == 0:
        if len(boxes):
            raise ValueError(f"images is empty; expected the images of {len(boxes)} boxes.")
        return [boxes.new_zeros(1, 1, 3, dtype=torch.uint8)]
    return stacked


def _check_options(options: Options) -> None:
    size, padding, mean, std, udp, dtype = options
    least = 2 if udp else 1
    if (
        not isinstance(size, tuple | list)
        or len(size) != 2
        or not all(isinstance(s, int) and least <= s < 2**15 for s in size)
    ):
        reason = ", as UDP maps two ends of each side" if udp else ""
        raise ValueError(
            f"size is {size}; expected (height, width), each {least} to 32767{reason}."
        )
    if not isinstance(padding, int | float) or not 0 < padding < math.inf:
        raise ValueError(f"padding is {padding!r}; expected a positive number.")
    for name, numbers in (("mean", mean), ("std", std)):
        if not isinstance(numbers, Iterable) or isinstance(numbers, str):
            raise TypeError(f"{name} is {numbers!r}; expected three numbers.")
        if len(numbers) != 3 or not all(math.isfinite(n) for n in numbers):
            raise ValueError(f"{name} is {numbers}; expected three finite numbers.")
    if not all(s > 0 for s in std):
        raise ValueError(f"std is {std}; expected positive numbers.")
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype}; expected torch.float32, torch.float16 or .bfloat16.")


def _check_persons(
    boxes: Tensor, image_index: Tensor, rotation: Tensor | None, device: torch.device
) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(
            f"boxes has shape {tuple(boxes.shape)}; expected (P, 4) as x, y, width, height."
        )
    if boxes.is_complex() or boxes.dtype == torch.bool:
        raise TypeError(f"boxes is {boxes.dtype}; expected real numbers.")
    persons = {"boxes": boxes, "image_index": image_index}
    if rotation is not None:
        persons["rotation"] = rotation
    for name, tensor in persons.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; expected a tensor.")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; expected {device}, as images.")
        if name != "boxes" and tensor.shape != boxes.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {tuple(boxes.shape[:1])}, "
                "one for each box."
            )
    if image_index.dtype != torch.int64:
        raise TypeError(f"image_index is {image_index.dtype}; expected torch.int64.")
    if rotation is not None and not rotation.is_floating_point():
        raise TypeError(f"rotation is {rotation.dtype}; expected floating-point degrees.")


def _refuse_unusable(
    boxes: Tensor, image_index: Tensor, rotation: Tensor | None, images: int, options: Options
) -> None:
    geometry = box_to_center_scale(boxes, options.size, padding=options.padding)
    usable = is_usable(boxes, *geometry, image_index, images, rotation)
    if not usable.all():
        _refuse(int(usable.int().argmin()), boxes, image_index, rotation, images)


def _refuse(
    person: int, boxes: Tensor, image_index: Tensor, rotation: Tensor | None, images: int
) -> None:
    """The error for a person that `is_usable` rejects."""
    index = int(image_index[person])
    if not 0 <= index < images:
        raise ValueError(f"image_index[{person}] is {index}; expected 0 to {images - 1}.")
    if rotation is not None and not rotation[person].isfinite():
        raise ValueError(f"rotation[{person}] is {float(rotation[person])}; expected degrees.")
    raise ValueError(
        f"boxes[{person}] is {boxes[person].tolist()}; expected finite numbers, and a width and a "
        "height that are positive and neither too small nor too large to be cropped."
    )


def image_set(images: Sequence[Tensor]) -> tuple[tuple[int, ...], Tensor | None]:
    """How a kernel finds the images, starting from the address of the first.

    Either (images, height, width, and the strides of image, row, pixel and channel), or zeros but
    for their number and a table (N, 6) int64 on their device: distance from the first in bytes,
    height, width, and the strides of row, pixel and channel.
    """
    first = images[0]
    if len(images) == 1:
        count, stride = (len(first), first.stride(0)) if first.ndim == 4 else (1, 0)
        return (count, *first.shape[-3:-1], stride, *first.stride()[-3:]), None
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"images is a list of {len(images)}; expected a batch while a CUDA graph is captured, "
            "which would keep their addresses."
        )
    start = first.data_ptr()
    rows = [(image.data_ptr() - start, *image.shape[:2], *image.stride()) for image in images]
    table = torch.tensor(rows, pin_memory=first.is_cuda).to(first.device, non_blocking=True)
    return (len(images), 0, 0, 0, 0, 0, 0), table


def _run(
    images: Sequence[Tensor],
    boxes: Tensor,
    image_index: Tensor,
    rotation: Tensor | None,
    *arguments: Any,
) -> Result:
    """arguments: the fields of `Options`, then the backend."""
    options, backend = Options(*arguments[:-1]), arguments[-1]
    crops, centers, scales = _outputs(boxes, options)
    if len(boxes) == 0:
        return crops, centers, scales
    boxes, image_index = boxes.double().contiguous(), image_index.contiguous()
    turns = None
    if rotation is not None:
        angle = torch.deg2rad(rotation.double())
        turns = torch.stack((angle.cos(), angle.sin()), -1)
    if backend == "cpu":  # by pixels of three neighbouring bytes
        images = [i if i.stride()[-2:] == (3, 1) else i.contiguous() for i in images]
    found, table = image_set(images)
    persons = (boxes, image_index, turns, crops, centers, scales)
    if backend == "triton":
        from kernelpose.triton_kernels import crop_normalize as kernels

        kernels.forward(images[0], table, found, *persons, *options[1:5])
        return crops, centers, scales
    size, padding, mean, std, udp, dtype = options
    shape = (len(boxes), *size, padding, udp, *mean, *std)
    pixels, places, *addresses = (_native.address(t) for t in (images[0], table, *persons))
    native = (pixels, places, found, *addresses, shape, _native.DTYPE_CODES[dtype])
    refused = _native.call("crop_normalize", crops, *native)
    if backend == "cpu" and refused >= 0:
        _refuse(refused, boxes, image_index, rotation, found[0])
    return crops, centers, scales


def _outputs(boxes: Tensor, options: Options) -> Result:
    persons = boxes.shape[0]
    crops = boxes.new_empty(persons, 3, *options.size, dtype=options.dtype)
    centers, scales = (boxes.new_empty(persons, 2, dtype=torch.float32) for _ in range(2))
    return crops, centers, scales


_op = register(
    "crop_normalize",
    "(Tensor[] images, Tensor boxes, Tensor image_index, Tensor? rotation, SymInt[2] size, "
    "float padding, float[] mean, float[] std, bool udp, ScalarType dtype, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _run,
    lambda images, boxes, image_index, rotation, *arguments: _outputs(
        boxes, Options(*arguments[:-1])
    ),
    autocast=False,
)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Four persons on each of two photographs."""
    images = torch.zeros(2, 480, 640, 3, dtype=torch.uint8, device=device)
    boxes = torch.tensor([[100, 100, 150, 300]], device=device).repeat(8, 1)
    index = torch.arange(8, device=device) % 2
    return (images, boxes, index), {"size": (256, 192)}


register_backends(
    OpSpec(
        name="crop_normalize",
        dtypes=dict.fromkeys(("cuda", "triton", "cpu", "eager"), (torch.uint8,)),
        directions="fwd",
        automatic=lambda images: ("cpu",) if images.device.type == "cpu" else ("cuda", "triton"),
        objection=lambda *inputs, **options: None,
        example=_example,
    )
)
