"""The feed-forward network of PVT v2, with a depthwise convolution inside, as a drop-in module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernelpose import ops
from kernelpose.backend import choose
from kernelpose.nn.multi_scale import bias_of
from kernelpose.ops._register import is_plain

_STRIP_BYTES = 2**22  # of hidden tokens


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

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        if self._runs_in_strips(x):
            return self._in_strips(x, feat_size)
        bias = bias_of(self.dwconv)
        hidden = ops.dwconv_gelu(self.fc1(x), self.dwconv.weight, bias, size=feat_size)
        y: Tensor = self.fc2(hidden)
        return y

    def _runs_in_strips(self, x: Tensor) -> bool:
        hidden_bytes = x.shape[0] * x.shape[1] * self.fc1.out_features * x.element_size()
        if not x.is_cpu or hidden_bytes <= _STRIP_BYTES or torch.is_autocast_enabled("cpu"):
            return False
        layers = (self.fc1, self.dwconv, self.fc2)
        parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
        return is_plain(x, *parameters) and choose("dwconv_gelu", None, x) == "cpu"

    def _in_strips(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        """The same, of an image or some of its rows after the other: all the hidden tokens, several
        times as many as x has, would leave the caches, and of several images be fresh pages in
        every call, which cost more than what is written there.
        """
        height, width = feat_size
        row_bytes = width * self.fc1.out_features * x.element_size()
        strips = -(-height * row_bytes // _STRIP_BYTES)
        rows = -(-height // strips)
        y = x.new_empty(*x.shape[:2], self.fc2.out_features)
        memory = x.new_empty(min(rows + 2, height) * width, self.fc1.out_features)
        fc1, fc2, bias = self.fc1.weight.t(), self.fc2.weight.t(), bias_of(self.dwconv)
        for tokens, result in zip(x.unbind(), y.unbind(), strict=True):
            for first in range(0, height, rows):
                end = min(first + rows, height)
                top, bottom = max(first - 1, 0), min(end + 1, height)  # with a row around it
                hidden = memory[: (bottom - top) * width]
                torch.addmm(self.fc1.bias, tokens[top * width : bottom * width], fc1, out=hidden)
                size = (bottom - top, width)
                hidden = ops.dwconv_gelu(hidden[None], self.dwconv.weight, bias, size=size)[0]
                hidden = hidden[(first - top) * width : (end - top) * width]
                torch.addmm(self.fc2.bias, hidden, fc2, out=result[first * width : end * width])
        return y
