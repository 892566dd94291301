"""The spatial reconstruction unit of SCConv as a drop-in module."""

from __future__ import annotations

from torch import Tensor, nn

from kernelpose import ops
from kernelpose.nn.untouched import untouched
from kernelpose.reference.spatial_gate import reconstruct


class SRU(nn.Module):
    """Spatial reconstruction unit: (B, C, H, W) -> (B, C, H, W), see `kernelpose.ops.spatial_gate`.

    Constructor and parameters (`gn.weight`, `gn.bias`) are those of the released MiTPOSE code, its
    spelling included.

    Args:
        oup_channels: C, even.
        group_num: groups of the normalisation; it divides C.
        gate_treshold: what the gate has to exceed.
        torch_gn: True; the normalisation that the released code has beside PyTorch's own is none
            that its models use.

    Raises:
        ValueError: the channels are odd, group_num does not divide them, or torch_gn is False.
    """

    def __init__(
        self,
        oup_channels: int,
        group_num: int = 16,
        gate_treshold: float = 0.5,
        torch_gn: bool = True,
    ) -> None:
        super().__init__()
        if oup_channels % 2:
            raise ValueError(f"oup_channels is {oup_channels}; expected an even number.")
        if group_num < 1 or oup_channels % group_num:
            raise ValueError(
                f"group_num is {group_num}; expected a divisor of oup_channels, which is "
                f"{oup_channels}."
            )
        if not torch_gn:
            raise ValueError("torch_gn is False; expected True, PyTorch's group normalisation.")
        self.gn = nn.GroupNorm(group_num, oup_channels)
        self.gate_treshold = gate_treshold

    def forward(self, x: Tensor) -> Tensor:
        gn = self.gn
        if not untouched(gn):
            return reconstruct(x, gn(x), gn.weight, self.gate_treshold)
        return ops.spatial_gate(
            x,
            gn.weight,
            gn.bias,
            groups=gn.num_groups,
            threshold=self.gate_treshold,
            eps=gn.eps,
        )

    def extra_repr(self) -> str:
        return f"gate_treshold={self.gate_treshold}"
