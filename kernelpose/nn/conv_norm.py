"""A convolution and the BatchNorm of its result."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from kernelpose.nn.folded_conv import FoldedConv, is_pointwise
from kernelpose.nn.folding import Folder, can_fold, fold
from kernelpose.nn.packed_linear import can_pack, pack, packed_linear
from kernelpose.nn.untouched import unhooked, untouched


class ConvNorm(nn.Module):
    """act(BN(conv(x))): (B, C, H, W) -> (B, out_channels, H / stride, W / stride).

    The convolution has no bias and pads with half its kernel. In eval mode the norm is folded into
    it (`FoldedConv`); on a CPU a 1x1 convolution, ReLU and the residual are then one call. Maps in
    channels_last memory stay so.

    Args:
        in_channels: C.
        out_channels: of the result.
        kernel_size: odd.
        stride: of the convolution.
        groups: of the convolution, as nn.Conv2d has them; C for a depthwise one.
        act: what follows; nothing by default.
        norm_name: of the norm in the state_dict, beside "conv".

    forward takes a `residual` of the result's shape, too, which is added to it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        act: nn.Module | None = None,
        norm_name: str = "norm",
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        )
        # As in SRAttention.
        nn.utils.convert_conv2d_weight_memory_format(self.conv, torch.channels_last)
        self.add_module(norm_name, nn.BatchNorm2d(out_channels))
        self._norm_name = norm_name
        self.act = act
        self._packer = Folder(_fold_and_pack)
        self._folded = FoldedConv()

    @property
    def pair(self) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        """The convolution and its norm."""
        modules = self._modules  # get_submodule takes ten times as long, and this is asked often
        return cast("Any", modules["conv"]), cast("Any", modules[self._norm_name])

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        pair = self.pair
        if self._packs(x, residual):
            ((weight, bias),) = self._packer([pair])
            more = None if residual is None else _tokens(residual)
            relu = self.act is not None
            return packed_linear(_tokens(x), weight, bias, relu, more).permute(0, 3, 1, 2)
        y = self._folded(x, *pair)
        if self.act is not None:
            y = self.act(y)
        return y if residual is None else residual + y

    def is_untouched(self, act: type[nn.Module] | None = None) -> bool:
        """Whether calling this is its convolution, its norm, such an activation, and no more."""
        own = self.act
        conv, norm = self.pair
        return (
            untouched(conv, norm)
            and unhooked(self)
            and (own is None if act is None else type(own) is act and unhooked(own))
        )

    def _packs(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether `packed_linear` computes the whole."""
        conv, norm = self.pair
        act = self.act
        return (
            untouched(conv, norm)
            and is_pointwise(conv)
            and can_fold([norm])
            and (act is None or (type(act) is nn.ReLU and unhooked(act) and residual is None))
            and can_pack(_tokens(x), conv.weight)
            and (residual is None or can_pack(_tokens(residual), conv.weight))
        )


def _tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _fold_and_pack(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    weight, bias = fold(conv, norm)
    return pack(weight.flatten(1)), bias
