"""A convolution of float32 maps on a CPU whose weight oneDNN finds arranged.

The operators are those that torch.compile's own code for a CPU calls, no public interface: where a
torch has them not, or under another name, nothing is packed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernelpose.backend import core_unasked
from kernelpose.nn.folding import Folder
from kernelpose.nn.untouched import untouched
from kernelpose.ops._register import is_plain

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name)
    for name in ("_reorder_convolution_weight", "_convolution_pointwise")
)


class PackedConv:
    """conv(x), for inference: without what oneDNN does to a large weight in every call, which takes
    as long as the convolution of a small map. A copy of the weight is kept until it changes."""

    def __init__(self) -> None:
        self._folder = Folder(_pack)

    def __call__(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """x (B, C, H, W); anything but float32 in channels_last memory is left to conv itself."""
        if not (untouched(conv) and _can_pack(x, conv)):
            y: Tensor = conv(x)
        else:
            ((weight,),) = self._folder([(conv,)])
            y = torch.ops.mkldnn._convolution_pointwise(
                x, weight, conv.bias, *_geometry(conv), "none", [], ""
            )
        return y


def _can_pack(x: Tensor, conv: nn.Conv2d) -> bool:
    return (
        _HAS_ONEDNN
        and is_plain(x, conv.weight, conv.bias)
        and x.is_cpu
        and x.dtype == conv.weight.dtype == torch.float32
        and x.ndim == 4
        and x.shape[1] == conv.in_channels
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and core_unasked()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and conv.padding_mode == "zeros"
    )


def _geometry(conv: nn.Conv2d) -> tuple[list[int], list[int], list[int], int]:
    assert not isinstance(conv.padding, str)
    return list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups


def _pack(conv: nn.Conv2d) -> tuple[Tensor]:
    return (torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *_geometry(conv)),)
