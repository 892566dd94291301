"""The spatial and channel reconstruction convolution (SCConv) of MiTPOSE as a drop-in module."""

from __future__ import annotations

from torch import Tensor, nn

from kernelpose.nn.cru import CRU
from kernelpose.nn.grn import GRN as GlobalResponseNorm
from kernelpose.nn.sru import SRU


class ScConv(nn.Module):
    """CRU(SRU(x)), on a map (B, C, H, W) or on the tokens (B, H W, C) of one.

    Constructor and parameters are those of the released MiTPOSE code, which knows tokens of a
    16 x 12 map alone. Tokens are a channels_last map, and never copied to be one.

    Args:
        op_channel, group_num, gate_treshold, alpha, squeeze_radio, group_size, group_kernel_size:
            as in `SRU` and `CRU`.
        softmax: as in `CRU`.
        grn: put a global response normalisation (`kernelpose.nn.GRN`) last; it starts as nothing.
    """

    GRN: GlobalResponseNorm | None

    def __init__(
        self,
        op_channel: int,
        group_num: int = 4,
        gate_treshold: float = 0.5,
        alpha: float = 1 / 2,
        squeeze_radio: int = 2,
        group_size: int = 2,
        group_kernel_size: int = 3,
        *,
        softmax: str = "joint",
        grn: bool = False,
    ) -> None:
        super().__init__()
        self.SRU = SRU(op_channel, group_num, gate_treshold)
        self.CRU = CRU(
            op_channel, alpha, squeeze_radio, group_size, group_kernel_size, softmax=softmax
        )
        self.GRN = GlobalResponseNorm(op_channel, channels_last=False) if grn else None

    def forward(self, x: Tensor, size: tuple[int, int] = (16, 12)) -> Tensor:
        """x: (B, C, H, W), or tokens (B, H W, C) of a map of `size` (H, W); the result is alike."""
        if x.ndim == 3:
            if x.shape[1] != size[0] * size[1]:
                raise ValueError(
                    f"x has {x.shape[1]} tokens; expected {size[0] * size[1]}, as size is {size}."
                )
            maps = x.unflatten(1, size).permute(0, 3, 1, 2)
            return self.forward(maps).permute(0, 2, 3, 1).flatten(1, 2)
        x = self.CRU(self.SRU(x))
        return x if self.GRN is None else self.GRN(x)
