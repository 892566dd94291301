"""LayerNorm that also adds what a residual branch computed."""

from __future__ import annotations

from torch import Tensor, nn

from kernelpose import ops


class AddLayerNorm(nn.LayerNorm):
    """(x, branch) -> (x + branch, LayerNorm of it); without a branch (x, LayerNorm of x).

    Constructor and state_dict are those of nn.LayerNorm, over one dimension. A transformer block
    that hands its last branch on, instead of adding it, reads and writes the residual stream once
    for the sum and the next norm, see `kernelpose.ops.add_layer_norm`.

    forward: x (..., C) and branch, of its shape or None -> two tensors of that shape.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, branch: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if branch is None:
            return x, super().forward(x)
        return ops.add_layer_norm(x, branch, self.weight, self.bias, eps=self.eps)
