"""Global response normalisation as a drop-in module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernelpose import ops


class GRN(nn.Module):
    """gamma · x · n + beta + x, see `kernelpose.ops.grn`; gamma and beta start at 0.

    Constructor, parameters `gamma` and `beta` and their shape (1, 1, 1, dim) are those of ConvNeXt
    V2's GRN; eps and channels_last are those of timm's GlobalResponseNorm, whose `weight` and
    `bias` load as well.

    Args:
        dim: channels.
        eps: added to the mean norm.
        channels_last: x is (B, H, W, dim), as in ConvNeXt V2; else (B, dim, H, W), and the
            parameters are (1, dim, 1, 1).
    """

    def __init__(self, dim: int, eps: float = 1e-6, channels_last: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.channels_last = channels_last
        shape = (1, 1, 1, dim) if channels_last else (1, dim, 1, 1)
        self.gamma = nn.Parameter(torch.zeros(shape))
        self.beta = nn.Parameter(torch.zeros(shape))
        self.register_load_state_dict_pre_hook(_name_and_shape)

    def forward(self, x: Tensor) -> Tensor:
        return ops.grn(x, self.gamma, self.beta, eps=self.eps, channels_last=self.channels_last)

    def extra_repr(self) -> str:
        return f"{self.gamma.numel()}, eps={self.eps}, channels_last={self.channels_last}"


def _name_and_shape(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Other layers' names of the parameters, and other shapes of as many elements."""
    for own, timm in (("gamma", "weight"), ("beta", "bias")):
        found = state.pop(prefix + timm, None)
        found = state.get(prefix + own, found)
        if found is not None:
            shape = module.get_parameter(own).shape
            state[prefix + own] = found.reshape(shape) if found.numel() == shape.numel() else found
