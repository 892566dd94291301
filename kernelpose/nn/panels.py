"""Weights of linears in the order in which the core's products read them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernelpose import _native


def panels(weight: Tensor) -> Tensor:
    """(outputs, inputs) -> (panels, inputs, outputs of a panel), the last ones 0."""
    assert _native.core is not None
    panel = _native.core.cpu_panel_columns()
    weight = F.pad(weight, (0, 0, 0, -len(weight) % panel))
    return weight.unflatten(0, (-1, panel)).transpose(1, 2).contiguous()
