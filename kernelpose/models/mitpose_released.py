"""The backbone of the released MiTPOSE code, with the names under which mmpretrain saves it."""

from __future__ import annotations

import torch
from torch import nn

from kernelpose.models.position import resize_position_table
from kernelpose.models.vit import PATCH_PADDING, PATCH_SIZE, DropPath, on_map
from kernelpose.nn import AddLayerNorm, MultiScaleModule, ScConv, WindowAttention


class PatchEmbed(nn.Module):
    """Image (B, 3, H, W) -> (B, C, rows, columns)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        padding = PATCH_PADDING[PATCH_SIZE]
        self.projection = nn.Conv2d(3, dim, PATCH_SIZE, stride=PATCH_SIZE, padding=padding)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.projection(image)
        return y


class FeedForward(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(dim, hidden), nn.GELU())
        self.layers = nn.Sequential(first, nn.Linear(hidden, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


class Block(nn.Module):
    """x += attn(ln1(x)); x += scc(ln1(x)); x += ffn(ln2(x)), over (B, rows, columns, C).

    Stochastic depth leaves the second sum alone, as in the released code. The last branch is handed
    on, for the next norm to add: forward takes and gives x and a branch.
    """

    def __init__(
        self, dim: int, num_heads: int, hidden: int, drop_path: float, layer_norm_eps: float
    ) -> None:
        super().__init__()
        self.ln1 = AddLayerNorm(dim, eps=layer_norm_eps)
        self.attn = WindowAttention(dim, num_heads)
        self.ln2 = AddLayerNorm(dim, eps=layer_norm_eps)
        self.scc = ScConv(dim)
        self.ffn = FeedForward(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: torch.Tensor, branch: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.ln1(x, branch)
        x, y = self.ln1(x, self.drop_path(self.attn(y)))
        x, y = self.ln2(x, on_map(self.scc, y))
        return x, self.drop_path(self.ffn(y))


class ReleasedTransformer(nn.Module):
    """Images (B, 3, H, W) -> (B, C, rows, columns), in channels_last memory.

    The released code fixes the width at 768 and the map at 16x12; here both are free. Its patch
    embedding gets its padding from a configuration that was not released: 2, as ViTPose's.

    Args:
        dim, depth, num_heads, mlp_hidden: sizes.
        image_size: (height, width) that the position table, without a class slot, is made for.
        drop_path: rate of the last layer; the first has 0, linear in between.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_hidden: int,
        image_size: tuple[int, int],
        drop_path: float,
        layer_norm_eps: float,
    ) -> None:
        super().__init__()
        self.module = MultiScaleModule(dim, dim)
        self.patch_embed = PatchEmbed(dim)
        padding = 2 * PATCH_PADDING[PATCH_SIZE]
        rows, columns = ((side + padding) // PATCH_SIZE for side in image_size)
        self.grid = (rows, columns)
        self.pos_embed = nn.Parameter(torch.empty(1, rows * columns, dim))
        last = max(depth - 1, 1)
        self.layers = nn.ModuleList(
            Block(dim, num_heads, mlp_hidden, drop_path * layer / last, layer_norm_eps)
            for layer in range(depth)
        )
        self.ln1 = AddLayerNorm(dim, eps=layer_norm_eps)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        # One copy here spares one in every layer: the residual stream is tokens, C last.
        x = self.module(self.patch_embed(image)).permute(0, 2, 3, 1).contiguous()
        grid = (x.shape[1], x.shape[2])
        table: torch.Tensor = self.pos_embed
        if grid != self.grid:
            slot = torch.zeros_like(table[:, :1])
            table = resize_position_table(torch.cat((slot, table), 1), self.grid, grid)[:, 1:]
        x = x + table.view(1, *grid, -1)
        branch = None
        for layer in self.layers:
            x, branch = layer(x, branch)
        _, y = self.ln1(x, branch)
        features: torch.Tensor = y.permute(0, 3, 1, 2)
        return features
