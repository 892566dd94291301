"""Multi-head self-attention over a token map, full or in windows, as a drop-in module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernelpose import ops

Pair = tuple[int, int]


class WindowAttention(nn.Module):
    """x (B, H, W, C) -> proj(attention(qkv(x))) (B, H, W, C).

    Parameter names and shapes are those of the attention of ViT and Swin in timm and in the
    published code: `qkv` (3C, C), `proj` (C, C), and `relative_position_bias_table`
    ((2h-1)(2w-1), heads) where a relative-position bias is asked for; their state_dicts load. The
    buffer `relative_position_index` of Swin checkpoints is recomputed, so it is dropped on loading.

    Args:
        dim: C.
        num_heads, window, shift, partition, pooled, scale: as `kernelpose.ops.window_attention`.
        relative_position: learn a relative-position bias; needs a window.
        map_size: (H, W) of the map, needed only for the size of the bias table of a grid.
        qkv_bias: whether the projection to q, k and v has a bias.

    Raises:
        ValueError: num_heads does not divide dim, or the bias table has no size.
    """

    relative_position_bias_table: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: Pair | None = None,
        shift: Pair = (0, 0),
        partition: str = "window",
        pooled: bool = False,
        relative_position: bool = False,
        map_size: Pair | None = None,
        qkv_bias: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"num_heads is {num_heads}; expected a divisor of dim, which is {dim}."
            )
        self.num_heads = num_heads
        self.window = window
        self.shift = shift
        self.partition = partition
        self.pooled = pooled
        self.scale = scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.register_load_state_dict_pre_hook(_drop_relative_position_index)
        self.relative_position_bias_table = None
        if relative_position:
            group = window
            if partition == "grid" or window is None:
                if map_size is None:
                    raise ValueError(
                        "map_size is None; expected (H, W), which sizes the bias table of full "
                        "attention and of the grid partition."
                    )
                h, w = window or (1, 1)
                group = (-(-map_size[0] // h), -(-map_size[1] // w))
            assert group is not None
            table = torch.empty((2 * group[0] - 1) * (2 * group[1] - 1), num_heads)
            self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        attended = ops.window_attention(
            self.qkv(x),
            num_heads=self.num_heads,
            window=self.window,
            shift=self.shift,
            partition=self.partition,
            bias_table=self.relative_position_bias_table,
            pooled=self.pooled,
            scale=self.scale,
        )
        out: Tensor = self.proj(attended)
        return out

    def extra_repr(self) -> str:
        parts = [f"num_heads={self.num_heads}", f"window={self.window}"]
        if any(self.shift):
            parts.append(f"shift={self.shift}")
        if self.partition != "window":
            parts.append(f"partition={self.partition!r}")
        if self.pooled:
            parts.append("pooled=True")
        return ", ".join(parts)


def _drop_relative_position_index(
    module: nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    state.pop(prefix + "relative_position_index", None)
