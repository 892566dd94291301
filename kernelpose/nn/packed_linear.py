"""Linears of float32 tokens on a CPU in one call of oneDNN, its weight arranged once.

The operators are those that torch.compile's own code for a CPU calls. They are no public interface:
where a torch has them not, or under another name, nothing is packed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernelpose.nn.inference import core_infers

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
)


def can_pack(tokens: Tensor, weight: Tensor) -> bool:
    """Whether `packed_linear` may run: in inference, untraced, where no backend is named."""
    return (
        _HAS_ONEDNN
        and core_infers(tokens, weight)
        and tokens.is_contiguous()
        and tokens.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
    )


def pack(weight: Tensor) -> Tensor:
    """A float32 weight (outputs, inputs) as oneDNN wants it, for `packed_linear` alone."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def packed_linear(
    tokens: Tensor, weight: Tensor, bias: Tensor, relu: bool, residual: Tensor | None
) -> Tensor:
    """tokens (..., inputs) -> (..., outputs): [residual +] [relu](tokens weightᵀ + bias).

    weight: packed. residual: contiguous, of the result's shape; not together with relu.
    """
    if residual is not None:
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            tokens, residual, weight, bias, "add"
        )
        return total
    out: Tensor = torch.ops.mkldnn._linear_pointwise(
        tokens, weight, bias, "relu" if relu else "none", [], ""
    )
    return out
