"""Models small enough for tests of the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kernelpose
from kernelpose.models import ViTPose
from kernelpose.models.vitpose import SIZES


class Mosaic(nn.Module):
    """Each joint's heatmap is a fixed mix of the image's colours, averaged over 4x4 pixels.

    Equivariant under shifts by 4 pixels, and under a mirror whose joints are swapped: the mix of a
    right joint is that of its left one with red and blue exchanged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.image_size = (64, 48)
        self.weight = nn.Parameter(torch.rand(17, 3, generator=torch.Generator().manual_seed(0)))
        self.batches: list[int] | None = []  # their sizes, where they are wanted

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.batches is not None:
            self.batches.append(len(images))
        pooled = torch.nn.functional.avg_pool2d(images, 4)
        return torch.einsum("kc,bchw->bkhw", self.weight, pooled).exp()


@pytest.fixture
def mosaic() -> Mosaic:
    return Mosaic()


@pytest.fixture
def simcc_mosaic(mosaic: Mosaic) -> Mosaic:
    """A mosaic that gives logits over columns and rows: the largest of each in the heatmaps."""
    mosaic.register_forward_hook(lambda model, inputs, maps: (maps.amax(2), maps.amax(3)))
    return mosaic


@pytest.fixture
def pictures() -> Callable[[int], list[np.ndarray]]:
    def make(count: int) -> list[np.ndarray]:
        generator = np.random.default_rng(count)
        sizes = [(50 + 7 * i, 60 + 5 * i, 3) for i in range(count)]
        return [generator.integers(0, 256, size, dtype=np.uint8) for size in sizes]

    return make


@pytest.fixture
def tiny_vitpose(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`kernelpose.create_model` makes a ViTPose of two narrow layers; returns the names asked."""
    asked: list[str] = []
    size = {"embed_dim": 24, "depth": 2, "num_heads": 2, "drop_path": 0.0}

    def create_model(name: str, **options: Any) -> nn.Module:
        asked.append(name)
        return ViTPose(**{**size, "image_size": (64, 48), "decoder": "simple", **options})

    # So that a checkpoint of it is recognised.
    monkeypatch.setitem(SIZES, "vitpose-b", size)
    monkeypatch.setattr(kernelpose, "create_model", create_model)
    return asked
