"""Weights of linears in the order in which the core's products read them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernelpose import _native


def panels(weight: Tensor) -> Tensor:
    """(outputs, inputs) -> (panels, inputs, outputs of a panel), the last ones 0: matmul.h's."""
    assert _native.core is not None
    return _panels(weight, _native.core.cpu_panel_columns())


def product_panels(weight: Tensor) -> Tensor:
    """The same in the panels of packed_product.h."""
    assert _native.core is not None
    return _panels(weight, _native.core.cpu_depthwise_ffn_panel())


def _panels(weight: Tensor, outputs: int) -> Tensor:
    weight = F.pad(weight, (0, 0, 0, -len(weight) % outputs))
    return weight.unflatten(0, (-1, outputs)).transpose(1, 2).contiguous()
