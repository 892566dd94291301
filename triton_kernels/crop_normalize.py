"""Crops of persons on images, normalised, in Triton.

What is computed: `kernelpose/reference/crop_normalize.py`. A program makes STEPS blocks of BLOCK
neighbouring pixels of one crop; before that it places the crop, from the box to the map from the
crop's pixels into the image, as `csrc/include/kernelpose/crop_normalize.h` does. That takes some
hundred operations in float64, which every thread repeats: hence several blocks a program. Compiled
without contraction, so that the coordinates are those of the reference.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
STEPS = 4
WARPS = 4
REGISTERS = 96  # a thread; a budget that the tests check
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, half to even

# They change from call to call: they must not cost a compilation each.
NUMBERS = [
    *("count", "image_height", "image_width", "image_stride", "row_stride", "pixel_stride"),
    *("channel_stride", "height", "width"),
]


@triton.jit
def _extent(low, high):
    """Middle and size of a side whose ends are rounded to float32, as mmpose rounds them."""
    low, high = low.to(tl.float32), high.to(tl.float32)
    return (high + low) * 0.5, high - low


@triton.jit
def _split(x, size):
    """Floor and fraction; what lies outside [-2, size] is moved there, where all is black."""
    x = tl.minimum(tl.maximum(x, -2.0), size.to(tl.float32))
    whole = tl.floor(x)
    return whole.to(tl.int32), x - whole


@triton.jit
def _pixels(row, x, exists, width, pixel_stride):
    """Pixels x and x + 1 of a row, float32, black outside the image."""
    left = tl.load(row + x * pixel_stride, mask=exists & (x >= 0) & (x < width), other=0)
    inside = exists & (x >= -1) & (x + 1 < width)
    right = tl.load(row + (x + 1) * pixel_stride, mask=inside, other=0)
    return left.to(tl.float32), right.to(tl.float32)


@triton.jit(do_not_specialize=NUMBERS)
def _crop_normalize_kernel(
    images,  # the first image, uint8
    table,  # (images, 6) int64: distance, height, width, strides of row, pixel, channel; or None
    boxes,  # (persons, 4) float64
    image_index,  # (persons) int64
    turns,  # (persons, 2) float64: cosine and sine of the rotation; or None
    crops,  # (persons, 3, height, width)
    centers,  # (persons, 2) float32
    scales,  # (persons, 2) float32
    count,  # images
    image_height,
    image_width,
    image_stride,
    row_stride,
    pixel_stride,
    channel_stride,
    height,
    width,
    padding,
    aspect,  # width / height
    factor_r,  # a grey level x becomes x * factor + offset
    factor_g,
    factor_b,
    offset_r,
    offset_g,
    offset_b,
    UDP: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program: STEPS * BLOCK neighbouring pixels of one crop."""
    tiles = tl.cdiv(height * width, STEPS * BLOCK)
    person = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles

    box_x, box_y = tl.load(boxes + 4 * person), tl.load(boxes + 4 * person + 1)
    box_w, box_h = tl.load(boxes + 4 * person + 2), tl.load(boxes + 4 * person + 3)
    center_x, extent_x = _extent(box_x, box_x + box_w)
    center_y, extent_y = _extent(box_y, box_y + box_h)
    extent_x, extent_y = extent_x * padding, extent_y * padding
    wanted = extent_y * aspect
    wide = extent_x > wanted
    scale_x = tl.where(wide, extent_x, wanted)
    scale_y = tl.where(wide, tl.div_rn(extent_x, aspect), extent_y)
    if tile == 0:
        tl.store(centers + 2 * person, center_x)
        tl.store(centers + 2 * person + 1, center_y)
        tl.store(scales + 2 * person, scale_x)
        tl.store(scales + 2 * person + 1, scale_y)

    index = tl.load(image_index + person)
    usable = (index >= 0) & (index < count) & (box_w > 0) & (box_h > 0)
    usable = usable & (scale_x >= 1e-6) & (scale_x <= 1e9) & (scale_y >= 1e-6) & (scale_y <= 1e9)
    usable = usable & (tl.abs(center_x) <= 1e9) & (tl.abs(center_y) <= 1e9)
    cosine, sine = 1.0, 0.0
    if turns is not None:
        cosine, sine = tl.load(turns + 2 * person), tl.load(turns + 2 * person + 1)
        usable = usable & (cosine * cosine + sine * sine > 0.5)  # not a number: no rotation
        cosine, sine = tl.where(usable, cosine, 1.0), tl.where(usable, sine, 0.0)
    # A person that has no crop is placed somewhere finite, on an image without rows.
    unit_x = tl.where(usable, scale_x, 1.0).to(tl.float64)
    unit_y = tl.where(usable, scale_y, 1.0).to(tl.float64)
    center_x = tl.where(usable, center_x, 0.0).to(tl.float64)
    center_y = tl.where(usable, center_y, 0.0).to(tl.float64)
    index = tl.where(usable, index, 0)

    crop_w, crop_h = width.to(tl.float64), height.to(tl.float64)
    if UDP:
        fx, fy = (crop_w - 1) / unit_x, (crop_h - 1) / unit_y
        middle_x, middle_y = (crop_w - 1) * 0.5, (crop_h - 1) * 0.5
        turn = sine
    else:
        fx = crop_w / unit_x
        fy = fx
        middle_x, middle_y = crop_w * 0.5, crop_h * 0.5
        turn = -sine
    a, b, c, d = cosine * fx, -turn * fx, turn * fy, cosine * fy
    tx = (middle_x - (a * center_x + b * center_y)).to(tl.float32).to(tl.float64)
    ty = (middle_y - (c * center_x + d * center_y)).to(tl.float32).to(tl.float64)
    # The forward map is read as float32, its inverse applied as float32.
    a, b = a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64)
    c, d = c.to(tl.float32).to(tl.float64), d.to(tl.float32).to(tl.float64)
    inverse = 1.0 / (a * d - b * c)
    xx, xy, yx, yy = d * inverse, -b * inverse, -c * inverse, a * inverse
    x0, y0 = (-xx * tx - xy * ty).to(tl.float32), (-yx * tx - yy * ty).to(tl.float32)

    if table is not None:
        entry = table + 6 * index
        base = images + tl.load(entry)
        image_height, image_width = tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
        row_stride, pixel_stride = tl.load(entry + 3), tl.load(entry + 4)
        channel_stride = tl.load(entry + 5)
    else:
        base = images + index * image_stride
    image_height = tl.where(usable, image_height, 0)

    xx, xy = xx.to(tl.float32), xy.to(tl.float32)
    yx, yy = yx.to(tl.float32), yy.to(tl.float32)
    crop = crops + person * 3 * height * width
    for step in range(STEPS):
        pixels = (tile * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        row, column = (pixels // width).to(tl.float32), (pixels % width).to(tl.float32)
        x, along = _split(column * xx + (row * xy + x0), image_width)
        y, down = _split(column * yx + (row * yy + y0), image_height)
        upper, lower = (y >= 0) & (y < image_height), (y >= -1) & (y + 1 < image_height)
        x, rows = x.to(tl.int64), base + y.to(tl.int64) * row_stride
        for plane in tl.static_range(3):
            left, right = _pixels(rows, x, upper, image_width, pixel_stride)
            top = left + along * (right - left)
            left, right = _pixels(rows + row_stride, x, lower, image_width, pixel_stride)
            bottom = left + along * (right - left)
            level = (top + down * (bottom - top) + ROUND) - ROUND
            factor = factor_r if plane == 0 else (factor_g if plane == 1 else factor_b)
            offset = offset_r if plane == 0 else (offset_g if plane == 1 else offset_b)
            value = (level * factor + offset).to(crops.dtype.element_ty)
            tl.store(crop + plane * height * width + pixels, value, mask=pixels < height * width)
            rows += channel_stride


def forward(
    image: Tensor,
    table: Tensor | None,
    found: tuple[int, ...],
    boxes: Tensor,
    image_index: Tensor,
    turns: Tensor | None,
    crops: Tensor,
    centers: Tensor,
    scales: Tensor,
    padding: float,
    mean: Sequence[float],
    std: Sequence[float],
    udp: bool,
) -> None:
    """Fill crops, centers and scales.

    found, table: as `kernelpose.ops.crop_normalize.image_set` has them, of the images that start
    with `image`.
    """
    persons, _, height, width = crops.shape
    factors = [1 / (255 * s) for s in std]
    offsets = [-m / s for m, s in zip(mean, std, strict=True)]
    with torch.cuda.device_of(image):
        _crop_normalize_kernel[(persons * triton.cdiv(height * width, STEPS * BLOCK),)](
            *(image, table, boxes, image_index, turns, crops, centers, scales),
            *found,
            *(height, width, padding, width / height, *factors, *offsets),
            UDP=udp,
            BLOCK=BLOCK,
            STEPS=STEPS,
            **launch_options(),
        )


def launch_options() -> dict[str, int | bool]:
    """What Triton compiles the kernel with."""
    return {"num_warps": WARPS, "maxnreg": REGISTERS, "enable_fp_fusion": False}
