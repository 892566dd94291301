"""The model zoo: names, and what builds them.

A model family is one file in this package that registers its names:

    @register("vitpose-s", "vitpose-b")
    def build(name, *, num_keypoints, image_size, decoder, **options): ...

Files are found by being there; no list has to be kept.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from kernelpose.errors import UserError

Builder = Callable[..., nn.Module]
_BUILDERS: dict[str, Builder] = {}


def register(*names: str) -> Callable[[Builder], Builder]:
    """Registers a builder `(name, *, num_keypoints, image_size, decoder, **options)`.

    `decoder` is None where the user named none: the family takes its own.
    Raises ValueError if a name is taken.
    """

    def decorate(builder: Builder) -> Builder:
        for name in names:
            if name in _BUILDERS:
                raise ValueError(f"names hold {name!r}; expected one that is not registered yet.")
            _BUILDERS[name] = builder
        return builder

    return decorate


def list_models() -> list[str]:
    """Names that `create_model` knows; within a family from small to large."""
    _discover()
    return list(_BUILDERS)


def create_model(
    name: str,
    *,
    num_keypoints: int | Mapping[str, int] = 17,
    image_size: tuple[int, int] = (256, 192),
    decoder: str | None = None,
    **options: Any,
) -> nn.Module:
    """Builds a model of the zoo with random weights.

    Args:
        name: one of `list_models()`.
        num_keypoints: joints; a mapping {data set: joints} gives one decoder for each data set
            on one encoder, chosen with `model(images, dataset=...)`.
        image_size: (height, width) of the input.
        decoder: the family's own by default ("classic" for ViTPose).
        options: further arguments of the family's class, such as `kernelpose.models.ViTPose`.

    Raises UserError for an unknown name, ValueError for a value that a family refuses.
    """
    _discover()
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, _BUILDERS, n=4, cutoff=0.5) or list(_BUILDERS)
        raise UserError(
            f"name is {name!r}; expected one of list_models(), such as {', '.join(near)}."
        )
    return _BUILDERS[name](
        name, num_keypoints=num_keypoints, image_size=image_size, decoder=decoder, **options
    )


def _discover() -> None:
    package = importlib.import_module("kernelpose.models")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"kernelpose.models.{module.name}")
