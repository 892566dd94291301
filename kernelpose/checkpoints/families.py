"""The model families whose checkpoints are known, and what each of them needs to be told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from kernelpose.checkpoints import hevitpose, mitpose, mobilevit, pyramid, vitpose
from kernelpose.checkpoints.files import StateDict
from kernelpose.checkpoints.layouts import LAYOUTS, Layout
from kernelpose.errors import UserError
from kernelpose.models.hevitpose import SIZES as HEVITPOSE_SIZES
from kernelpose.models.hevitpose import HEViTPose
from kernelpose.models.hrpvt import HRPVT
from kernelpose.models.hrpvt import SIZES as HRPVT_SIZES
from kernelpose.models.mitpose import SIZES as MITPOSE_SIZES
from kernelpose.models.mitpose import MiTPOSE
from kernelpose.models.mobilevitpose import SIZES as MOBILEVITPOSE_SIZES
from kernelpose.models.mobilevitpose import MobileViTPose
from kernelpose.models.pvtv2 import SIZES as PVTV2_SIZES
from kernelpose.models.pvtv2 import PVTv2
from kernelpose.models.vitpose import SIZES as VITPOSE_SIZES
from kernelpose.models.vitpose import ViTPose
from kernelpose.nn.mobilevit_block import VARIANTS


@dataclass(frozen=True)
class Family:
    """A class of models and its layouts.

    Attributes:
        model: the class.
        layouts: by which its checkpoints are recognised; the first is ours.
        config: (tensors in our names, num_heads=, grid=, patch_stride=) -> arguments of the class.
        flat_grid: (tensors in our names) -> any grid for a position table that does not record its
            own, for where only shapes matter.
        sizes: arguments that tell the models of the zoo apart, by name.
        has_grid: whether our layout records the grid of a position table.
    """

    model: type[nn.Module]
    layouts: tuple[Layout, ...]
    config: Callable[..., dict[str, Any]]
    flat_grid: Callable[[StateDict], tuple[int, int] | None]
    sizes: Mapping[str, Mapping[str, Any]]
    has_grid: bool = False

    def layout(self, name: str) -> Layout:
        """Raises UserError for one that it does not have."""
        for layout in self.layouts:
            if layout.name == name:
                return layout
        names = ", ".join(layout.name for layout in self.layouts)
        raise UserError(
            f"to is {name!r}; expected one of {names} for a checkpoint of {self.model.__name__}."
        )


def _no_grid(tensors: StateDict) -> None:
    """Of a model without a position table."""


# A family before those whose marks its checkpoints have too.
FAMILIES = (
    Family(
        MiTPOSE,
        (mitpose.Figure(),),
        mitpose.config_of_figure,
        vitpose.flat_grid,
        {name: {**size, "layout": "figure"} for name, size in MITPOSE_SIZES.items()},
        has_grid=True,
    ),
    Family(
        MiTPOSE,
        (mitpose.Released(), mitpose.ReleasedMMPose1()),
        mitpose.config_of_released,
        mitpose.flat_grid_of_released,
        {
            f"{name}-released": {**size, "layout": "released"}
            for name, size in MITPOSE_SIZES.items()
        },
    ),
    Family(
        HRPVT,
        (
            pyramid.Timm(pyramid.BACKBONE),
            pyramid.MMPose(pyramid.BACKBONE),
            pyramid.Released(pyramid.BACKBONE),
        ),
        pyramid.config_of_hrpvt,
        _no_grid,
        HRPVT_SIZES,
    ),
    Family(
        HEViTPose,
        (hevitpose.Ours(),),
        hevitpose.config_of,
        _no_grid,
        HEVITPOSE_SIZES,
    ),
    Family(
        PVTv2,
        (pyramid.Timm(""), pyramid.MMPose(""), pyramid.Released("")),
        pyramid.config_of_pvtv2,
        _no_grid,
        PVTV2_SIZES,
    ),
    Family(
        MobileViTPose,
        tuple(
            mobilevit.MobileViT(variant, prefix)
            for prefix in (pyramid.BACKBONE, "")
            for variant in VARIANTS
        ),
        mobilevit.config_of,
        _no_grid,
        MOBILEVITPOSE_SIZES,
    ),
    Family(
        ViTPose,
        tuple(LAYOUTS.values()),
        vitpose.config_of,
        vitpose.flat_grid,
        VITPOSE_SIZES,
        has_grid=True,
    ),
)


def detect(names: Collection[str]) -> tuple[Family, Layout]:
    """Family and layout of a state_dict by its names. Raises UserError for none that is known."""
    present = set(names)
    for family in FAMILIES:
        for layout in family.layouts:
            if layout.recognises(present):
                return family, layout
    known = ", ".join(dict.fromkeys(family.model.__name__ for family in FAMILIES))
    some = ", ".join(sorted(present)[:3])
    raise UserError(
        f"checkpoint holds {some}; expected a model of {known}, in one of {', '.join(LAYOUTS)}."
    )


def detect_layout(names: Collection[str]) -> Layout:
    """As `detect`, the layout alone."""
    return detect(names)[1]
