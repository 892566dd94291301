"""MiTPOSE's local fine-grained perception: convolutions of three sizes and two gates."""

from __future__ import annotations

from torch import Tensor, nn

from kernelpose import ops
from kernelpose.nn.folding import bias_of
from kernelpose.nn.multi_scale import ChannelAttention, SpatialAttention
from kernelpose.nn.untouched import has_geometry, unhooked, untouched
from kernelpose.reference.multi_granularity import in_groups


class LocalPerception(nn.Module):
    """x (B, C, H, W) -> (a + s) y (B, C, H, W), with y = x + mix of [7x7, 5x5, 3x3 of x].

    The convolutions are depthwise and the mix is grouped, see `kernelpose.ops.multi_granularity`; a
    and s are the channel gate and the spatial gate of y, see `kernelpose.ops.dual_gate`. Parameters
    are named as those of the released MiTPOSE code's dense module with the same part
    (`kernelpose.nn.MultiScaleModule`). Tokens (B, N, C) come as
    `x.unflatten(1, (H, W)).permute(0, 3, 1, 2)`, which copies nothing.

    Args:
        dim: C.
        groups: of the mix; group j sees the j-th part of each convolution's channels.
        ratio: C over the hidden channels of the channel gate.

    Raises:
        ValueError: groups does not divide dim, or ratio is larger than dim.
    """

    def __init__(self, dim: int, groups: int = 16, ratio: int = 16) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"groups is {groups}; expected a divisor of dim, which is {dim}.")
        self.groups = groups
        self.conv_7x7 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.conv_5x5 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv_3x3 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.conv_1x1_final1 = nn.Conv2d(3 * dim, dim, 1, groups=groups)
        self.CA = ChannelAttention(dim, ratio)
        self.SA = SpatialAttention()

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.conv_7x7, self.conv_5x5, self.conv_3x3)
        mix = self.conv_1x1_final1
        if (
            untouched(*branches, mix)
            and has_geometry(self.conv_7x7, 7, padding=3)
            and has_geometry(self.conv_5x5, 5, padding=2)
            and has_geometry(self.conv_3x3, 3, padding=1)
            and has_geometry(mix, 1)
        ):
            y = ops.multi_granularity(
                x,
                [branch.weight for branch in branches],
                [bias_of(branch) for branch in branches],
                mix.weight,
                bias_of(mix),
                groups=self.groups,
            )
        else:
            y = mix(in_groups([branch(x) for branch in branches], self.groups)) + x
        gates = (self.CA.fc1, self.CA.fc2, self.SA.conv1)
        if (
            untouched(*gates)
            and unhooked(self.CA, self.SA)
            and has_geometry(self.CA.fc1, 1)
            and has_geometry(self.CA.fc2, 1)
            and has_geometry(self.SA.conv1, 7, padding=3)
        ):
            return ops.dual_gate(y, *(gate.weight for gate in gates))
        gated: Tensor = (self.CA(y) + self.SA(y)) * y
        return gated
