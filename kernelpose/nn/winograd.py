"""A 3x3 convolution, with or without the BatchNorm of its result, of fewer products."""

from __future__ import annotations

from torch import Tensor, nn

from kernelpose.nn.folding import Folder, bias_of, can_fold, fold
from kernelpose.nn.inference import core_infers
from kernelpose.nn.untouched import has_geometry, untouched
from kernelpose.ops import _winograd


class WinogradConv:
    """norm(conv(x)), or conv(x), for inference: maps (B, C, H, W) -> (B, outputs, H, W).

    By Winograd's F(2x2, 3x3) in float32 on a CPU, where neither a gradient nor a graph is wanted
    and no backend is named. The norm is folded, and the weight's transform, 16 numbers for 9, is
    kept until a tensor changes.
    """

    def __init__(self) -> None:
        self._folder = Folder(_pack)

    def suits(self, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> bool:
        """Whether that is so; conv is of stride 1, undilated, in one group, and keeps the size."""
        if not untouched(conv) or not has_geometry(conv, 3, padding=1):
            return False
        return (
            conv.groups == 1
            and (norm is not None or conv.bias is not None)
            and (norm is None or (untouched(norm) and can_fold([norm])))
            and core_infers(x, conv.weight)
            and x.ndim == 4
            and x.shape[1] == conv.in_channels
            and _winograd.suits(x, conv.weight, 1)
        )

    def __call__(self, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> Tensor:
        ((packed,),) = self._folder([(conv,) if norm is None else (conv, norm)])
        tokens = x.permute(0, 2, 3, 1).contiguous()
        return _winograd.convolve(tokens, packed, 1).permute(0, 3, 1, 2)


def _pack(conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> tuple[Tensor]:
    weight, bias = (conv.weight, bias_of(conv)) if norm is None else fold(conv, norm)
    nothing = weight.new_zeros(*weight.shape[:2], 1, 1)
    return (_winograd.pack(weight, bias, 1, nothing),)
