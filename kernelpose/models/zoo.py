"""The model zoo: names, and what builds them.

A model family is one file in this package that registers its names:

    @register("vitpose-s", "vitpose-b")
    def build(name, **options): ...

It is found by being there; what `list_models` says of its models are rows of `table`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from kernelpose.errors import UserError
from kernelpose.models.table import MODELS, ModelInfo

Builder = Callable[..., nn.Module]
_BUILDERS: dict[str, Builder] = {}


def register(*names: str) -> Callable[[Builder], Builder]:
    """Registers a builder `(name, **options)`; the options are those that the user gave.

    Raises ValueError if a name is taken.
    """

    def decorate(builder: Builder) -> Builder:
        for name in names:
            if name in _BUILDERS:
                raise ValueError(f"names hold {name!r}; expected one that is not registered yet.")
            _BUILDERS[name] = builder
        return builder

    return decorate


def list_models() -> list[ModelInfo]:
    """The pose models of the zoo, by family and within a family from small to large."""
    return list(MODELS)


def create_model(
    name: str,
    *,
    num_keypoints: int | Mapping[str, int] | None = None,
    image_size: tuple[int, int] | None = None,
    decoder: str | None = None,
    **options: Any,
) -> nn.Module:
    """Builds a model of the zoo with random weights.

    Args:
        name: of one of `list_models()`, or "pvtv2-b0", "-b1" or "-b2": a backbone alone, which has
            none of the next three arguments.
        num_keypoints: joints, 17 by default; a mapping {data set: joints} gives one decoder for
            each data set on one encoder, chosen with `model(images, dataset=...)`.
        image_size: (height, width) of the input, (256, 192) by default.
        decoder: one of the model's `ModelInfo.decoders`, the first by default.
        options: further arguments of the family's class, such as `kernelpose.models.ViTPose`.

    Raises UserError for an unknown name, ValueError for a value that a family refuses.
    """
    _discover()
    if name not in _BUILDERS:
        near = difflib.get_close_matches(str(name), _BUILDERS, n=4, cutoff=0.5) or list(_BUILDERS)
        raise UserError(
            f"name is {name!r}; expected that of one of list_models(), such as {', '.join(near)}."
        )
    common = {"num_keypoints": num_keypoints, "image_size": image_size, "decoder": decoder}
    given = {option: value for option, value in common.items() if value is not None}
    return _BUILDERS[name](name, **given, **options)


def _discover() -> None:
    package = importlib.import_module("kernelpose.models")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"kernelpose.models.{module.name}")
