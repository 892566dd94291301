"""The plain form of each model of the zoo that has one: of the others ours under eager is plain."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from benchmarks.plain.hevitpose import HEViTPose
from benchmarks.plain.hrpvt import HRPVT
from benchmarks.plain.mobilevitpose import MobileViTPose

Size = tuple[int, int]

# By name: (height, width) of the images -> the model.
PLAIN: dict[str, Callable[[Size], nn.Module]] = {
    "hevitpose-t": lambda _: HEViTPose((64, 128, 192), (1, 4, 4)),
    "hevitpose-s": lambda _: HEViTPose((128, 192, 256), (1, 4, 4)),
    "hevitpose-b": lambda _: HEViTPose((160, 256, 384), (1, 3, 4)),
    "mobilevitpose-xxs": lambda _: MobileViTPose(
        (16, 16, 24, 24, 48, 48, 64, 64, 80, 80, 320), (64, 80, 96), (2, 4, 3), 2
    ),
    "mobilevitpose-s": lambda _: MobileViTPose(
        (16, 32, 64, 64, 96, 96, 128, 128, 160, 160, 640), (144, 192, 240), (2, 4, 3), 4
    ),
    "hrpvt-s": lambda size: HRPVT((32, 64, 160, 256), (2, 2, 2, 2), size, every_stage=True),
    "hrpvt-m": lambda size: HRPVT((64, 128, 320, 512), (2, 2, 2, 2), size, every_stage=True),
    "hrpvt-l": lambda size: HRPVT((64, 128, 320, 512), (3, 4, 6, 3), size, every_stage=False),
}
