"""A convolution of float32 maps on a CPU whose weight oneDNN finds arranged.

The operators are those that torch.compile's own code for a CPU calls, no public interface: where a
torch has them not, or under another name, nothing is packed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernelpose.nn.folding import Folder, can_fold, fold
from kernelpose.nn.inference import core_infers
from kernelpose.nn.untouched import untouched

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name)
    for name in ("_reorder_convolution_weight", "_convolution_pointwise")
)


class PackedConv:
    """conv(x), or norm(conv(x)), for inference: without what oneDNN does to a large weight in every
    call, which takes as long as the convolution of a small map.

    In float32 on a CPU, of maps (B, C, H, W) in channels_last memory, where neither a gradient nor
    a graph is wanted and no backend is named. The norm is folded, and a copy of the weight is kept
    until it changes.
    """

    def __init__(self) -> None:
        self._folder = Folder(_pack)

    def suits(self, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> bool:
        """Whether that is so."""
        return (
            _HAS_ONEDNN
            and untouched(conv)
            and (norm is None or (untouched(norm) and can_fold([norm])))
            and core_infers(x, conv.weight, conv.bias)
            and x.ndim == 4
            and x.shape[1] == conv.in_channels
            and x.numel() > 0
            and x.is_contiguous(memory_format=torch.channels_last)
            and bool(torch.backends.mkldnn.enabled)
            and not isinstance(conv.padding, str)
        )

    def __call__(self, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> Tensor:
        ((weight, *bias),) = self._folder([(conv,) if norm is None else (conv, norm)])
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias[0] if bias else None, *_geometry(conv), "none", [], ""
        )
        return y


def _geometry(conv: nn.Conv2d) -> tuple[list[int], list[int], list[int], int]:
    assert not isinstance(conv.padding, str)
    return list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups


def _pack(conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> tuple[Tensor, ...]:
    """Weight and bias, if any."""
    weight, bias = (conv.weight, conv.bias) if norm is None else fold(conv, norm)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *_geometry(conv))
    return (packed,) if bias is None else (packed, bias)
