"""The demonstration's picture: what goes in, the heatmaps, and the joints that come out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kernelpose.data.images import pillow
from kernelpose.data.raster import Array
from kernelpose.data.skeletons import COCO
from kernelpose.pipeline.overlay import SIDE_COLORS

Picture = NDArray[np.uint8]

_GROUND, _INK, _QUIET = (250, 250, 248), (27, 34, 45), (102, 112, 127)
_MARGIN, _TEXT = 18, 17


def draw_heatmaps(crop: Picture, heatmaps: Tensor) -> Picture:
    """A darkened crop (H, W, 3) under its heatmaps (17, h, w), each in the colour of its side."""
    height, width = crop.shape[:2]
    # Corner pixels on corner pixels: heatmaps under UDP.
    maps = F.interpolate(heatmaps[None].float().cpu(), (height, width), mode="bicubic",
                         align_corners=True)[0].clamp(0, 1)  # fmt: skip
    canvas: Array = crop.astype(np.float32) * 0.35
    for joint, values in enumerate(maps.numpy()):
        color = np.array(SIDE_COLORS[COCO.side(joint)], np.float32)
        canvas += (color - canvas) * (0.95 * values[..., None])
    return np.rint(canvas).clip(0, 255).astype(np.uint8)


def side_by_side(panels: Sequence[tuple[str, Picture]], footnote: str) -> Picture:
    """Titled pictures in a row, of one height, over a line of text."""
    image_module = pillow("Image")
    font = pillow("ImageFont").load_default(_TEXT)
    small = pillow("ImageFont").load_default(_TEXT - 3)
    height = min(720, max(picture.shape[0] for _, picture in panels))
    widths = [round(height * p.shape[1] / p.shape[0]) for _, p in panels]
    top = _MARGIN + _TEXT + 12
    size = (sum(widths) + _MARGIN * (len(panels) + 1), top + height + _TEXT + 2 * _MARGIN)
    sheet = image_module.new("RGB", size, _GROUND)
    draw = pillow("ImageDraw").Draw(sheet)
    x = _MARGIN
    for (title, picture), width in zip(panels, widths, strict=True):
        draw.text((x, _MARGIN), title, font=font, fill=_INK)
        resized = image_module.fromarray(picture).resize((width, height), image_module.LANCZOS)
        sheet.paste(resized, (x, top))
        x += width + _MARGIN
    draw.text((_MARGIN, top + height + 14), footnote, font=small, fill=_QUIET)
    return np.asarray(sheet).copy()


def to_picture(crop: Tensor) -> Picture:
    """A uint8 crop (3, h, w) as (h, w, 3)."""
    picture: Picture = crop.permute(1, 2, 0).to(torch.uint8).cpu().numpy()
    return picture
