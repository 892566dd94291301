"""One attention of a model: its shape, ours, eager's, and what a careful user writes with SDPA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rows import Function
from kernelpose.ops import window_attention
from kernelpose.reference import window_attention as reference_module

Pair = tuple[int, int]


@dataclass(frozen=True)
class Case:
    size: Pair
    channels: int
    heads: int
    window: Pair | None = None
    shift: Pair = (0, 0)
    partition: str = "window"

    def arguments(self, qkv: Tensor) -> tuple[tuple[Tensor], dict[str, Any]]:
        return (qkv,), {
            "num_heads": self.heads,
            "window": self.window,
            "shift": self.shift,
            "partition": self.partition,
        }

    def ours(self, backend: str) -> Function:
        def run(qkv: Tensor) -> Tensor:
            args, options = self.arguments(qkv)
            return window_attention(*args, **options, backend=backend)

        return run

    def peer(self, device: torch.device, dtype: torch.dtype) -> Function:
        """What a careful user writes: roll, partition, SDPA with a mask made once, and back."""
        window = self.window or self.size
        geometry = (self.size, window, self.shift, self.partition)
        mask = None
        if any(self.shift):
            ids = reference_module.region_ids(*geometry, device)
            visible = ids[:, :, None] == ids[:, None, :]
            mask = torch.zeros(visible.shape, device=device, dtype=dtype)
            mask = mask.masked_fill(~visible, -torch.inf)[:, None]

        def run(qkv: Tensor) -> Tensor:
            groups = reference_module.to_groups(qkv, *geometry[1:])
            q, k, v = (
                groups.unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5).flatten(1, 2)
            )
            repeated = None if mask is None else mask.repeat(qkv.shape[0], 1, 1, 1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=repeated)
            out = out.transpose(1, 2).flatten(2).unflatten(0, (qkv.shape[0], -1))
            return reference_module.from_groups(out, *geometry)

        return run

    def eager(self, qkv: Tensor) -> Tensor:
        return self.ours("eager")(qkv)

    def attended_pairs(self) -> int:
        """Pairs of tokens that see each other, in one image and head."""
        total = 1
        window = self.window or self.size
        for size, edge, shift in zip(self.size, window, self.shift, strict=True):
            if self.partition == "grid":
                counts = [len(range(r, size, edge)) for r in range(min(edge, size))]
            else:
                starts = [0, *range(shift, size, edge)] if shift else list(range(0, size, edge))
                counts = [b - a for a, b in zip(starts, [*starts[1:], size], strict=True)]
            total *= sum(c * c for c in counts)
        return total

    def least(self, batch: int, backward: bool, element_size: int) -> tuple[int, int]:
        """(bytes, FLOPs): every tensor once; 2 products forward, 5 backward."""
        elements = batch * self.size[0] * self.size[1] * self.channels * (8 if backward else 4)
        products = 5 if backward else 2
        flops = 2 * products * batch * self.attended_pairs() * self.channels
        return elements * element_size, flops
