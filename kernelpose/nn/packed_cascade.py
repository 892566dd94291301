"""All layers of CascadedGroupSRAttention as one call, for inference on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernelpose import _native
from kernelpose.nn.conv_norm import ConvNorm
from kernelpose.nn.folding import Folder, can_fold, fold
from kernelpose.nn.inference import core_infers
from kernelpose.nn.panels import product_panels
from kernelpose.nn.untouched import has_geometry
from kernelpose.ops.cascaded_attention import MAX_GROUP_WIDTH

_MULTIPLE = 32  # what channels are divided by, on any CPU


class PackedCascade:
    """The attention of maps (B, C, H, W), its projection and a residual added to it.

    In float32 on a CPU, where neither a gradient nor a graph is wanted and no backend is named. The
    projection's norm is folded, and its weight, in the order in which it is read, kept until a
    tensor changes.
    """

    def __init__(self) -> None:
        self._folder = Folder(_pack)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        parameters: Sequence[Tensor],
        num_heads: int,
        eps: float,
        proj: nn.Module,
    ) -> Tensor | None:
        """None where that is not so, or the projection not as it was made.

        parameters, num_heads, eps: as `kernelpose.ops.cascaded_attention` takes them.
        """
        if type(proj) is not ConvNorm or not proj.is_untouched():
            return None
        conv, norm = proj.pair
        channels = x.shape[1]
        reduce, _, q, _, kv, _, out_weight, _, norm_weight, _ = parameters
        groups, width, _ = q.shape
        fits = (
            core_infers(x, residual, conv.weight, *parameters)
            and groups * width == len(reduce) == channels
            and q.shape == out_weight.shape == (groups, width, width)
            and kv.shape == (groups, 2 * width, width)
            and norm_weight.shape == (groups, width)
            and can_fold((norm,))
            and has_geometry(conv, 1)
            and conv.weight.shape[:2] == (channels, channels)
            and channels % _MULTIPLE == 0
            and width <= MAX_GROUP_WIDTH
            and width % num_heads == 0
            and (residual is None or residual.shape == x.shape)
        )
        if not fits:
            return None
        ((packed,),) = self._folder([(conv, norm)])
        x = x.permute(0, 2, 3, 1).contiguous()
        found, out = x.new_empty(x.shape), x.new_empty(x.shape)
        if out.numel():
            more = None if residual is None else residual.permute(0, 2, 3, 1).contiguous()
            shape = (*x.shape[:3], groups, width, num_heads, reduce.shape[3], eps)
            addresses = [t.data_ptr() for t in parameters]
            others = found.data_ptr(), packed.data_ptr(), _native.address(more), out.data_ptr()
            _native.call("cascaded_sr_attention", x, x.data_ptr(), addresses, *others, shape)
        return out.permute(0, 3, 1, 2)


def _pack(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor]:
    weight, bias = fold(conv, norm)
    return (torch.cat([product_panels(weight.flatten(1)).flatten(), bias]),)
