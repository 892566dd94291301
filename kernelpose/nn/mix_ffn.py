"""The feed-forward network of PVT v2, with a depthwise convolution inside, as a drop-in module."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kernelpose import ops
from kernelpose.nn.folding import bias_of
from kernelpose.nn.packed_mix_ffn import PackedMixFFN
from kernelpose.nn.untouched import has_geometry, untouched


class MixFFN(nn.Module):
    """fc2(GELU(dwconv(fc1(x)))): tokens (B, h * w, C) of a map -> the same map.

    The 3x3 depthwise convolution pads with zeros, from which the network learns where a token lies:
    PVT v2 has no position table. It runs on tokens, see `kernelpose.ops.dwconv_gelu`. Constructor
    and state_dict are those of timm's MlpWithDepthwiseConv, without its dropout.

    Args:
        in_features: C.
        hidden_features, out_features: C by default.

    forward: x (B, N, C) and feat_size (h, w) of its map, N = h * w.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
    ) -> None:
        super().__init__()
        hidden = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, out_features or in_features)
        self._packed = PackedMixFFN()

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        layers = (self.fc1, self.dwconv, self.fc2)
        if untouched(*layers) and self._packed.suits(x, *layers, feat_size):
            return self._packed(x, *layers, feat_size)
        hidden: Tensor = self.fc1(x)
        if untouched(self.dwconv) and has_geometry(self.dwconv, 3, padding=1):
            bias = bias_of(self.dwconv)
            hidden = ops.dwconv_gelu(hidden, self.dwconv.weight, bias, size=feat_size)
        else:
            maps = self.dwconv(hidden.transpose(1, 2).unflatten(2, feat_size))
            hidden = F.gelu(maps).flatten(2).transpose(1, 2)
        y: Tensor = self.fc2(hidden)
        return y
