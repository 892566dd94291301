"""The plain vision transformer that ViTPose and MiTPOSE use as their encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kernelpose.models.position import resize_position_table
from kernelpose.nn import AddLayerNorm, WindowAttention

PATCH_SIZE = 16
# Stride of the patch convolution: its padding. 16 and 8 give features at 1/16 and 1/8.
PATCH_PADDING = {16: 2, 8: 4}


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a residual branch for a whole sample.

    The branch is scaled by 1 / (1 - probability) where it is kept, so that its mean is unchanged.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.probability == 0.0:
            return x
        keep = 1.0 - self.probability
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        return f"probability={self.probability:.3f}"


class PatchEmbed(nn.Module):
    """Image (B, 3, H, W) -> tokens (B, rows, columns, C), contiguous, by one convolution."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = PATCH_PADDING[stride]
        self.proj = nn.Conv2d(3, dim, PATCH_SIZE, stride=stride, padding=self.padding)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Tokens (rows, columns) of an image (height, width)."""
        rows, columns = (
            (side + 2 * self.padding - PATCH_SIZE) // self.stride + 1 for side in image_size
        )
        return rows, columns

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        # Without this one copy the residual stream would stay channel-major through every block.
        tokens: torch.Tensor = self.proj(image).permute(0, 2, 3, 1).contiguous()
        return tokens


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))), with the exact (erf) GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class Block(nn.Module):
    """x += attn(norm1(x)); x += local(norm1(x)), if any; x += mlp(norm2(x)).

    x is a token map (B, rows, columns, C); `local` takes and gives a (B, C, rows, columns) view.
    The last branch is handed on, for the next norm to add: forward takes and gives x and a branch.
    """

    def __init__(
        self,
        attn: nn.Module,
        dim: int,
        hidden: int,
        drop_path: float,
        layer_norm_eps: float,
        local: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = AddLayerNorm(dim, eps=layer_norm_eps)
        self.attn = attn
        self.local = local
        self.drop_path = DropPath(drop_path)
        self.norm2 = AddLayerNorm(dim, eps=layer_norm_eps)
        self.mlp = Mlp(dim, hidden)

    def forward(
        self, x: torch.Tensor, branch: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.norm1(x, branch)
        branch = self.drop_path(self.attn(y))
        if self.local is not None:
            x, y = self.norm1(x, branch)
            branch = self.drop_path(on_map(self.local, y))
        x, y = self.norm2(x, branch)
        return x, self.drop_path(self.mlp(y))


def on_map(module: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """A module of (B, C, rows, columns) on tokens (B, rows, columns, C), without a copy."""
    y: torch.Tensor = module(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return y


class VisionTransformer(nn.Module):
    """Patch embedding, learned positions, blocks, a last LayerNorm.

    There is no class token, yet the position table keeps its row: row 0 is added to every token
    along with the token's own row, as in the released ViTPose.

    The table belongs to `grid`, the token grid of `image_size`. An image of another size gets the
    table resampled from that grid. The buffer `pos_grid` records it in the state_dict, because the
    table's length alone tells neither the aspect nor the orientation; a state_dict without it (the
    official layout) is taken to have this model's grid.

    Two more buffers record what no parameter's shape tells, where it is not the released models'
    choice: `windows` (`window_table`) if any layer attends within windows, `patch_stride` if it is
    not 16. Loading a state_dict leaves both as they are: all forms share their parameters.

    Args:
        dim: width C.
        mlp_hidden: width of the hidden layer of the MLPs.
        attentions: arguments of each layer's `WindowAttention` beyond dim and num_heads.
        drop_path: rate of the last layer; the first has 0, linear in between.
        refine: a module of maps (B, C, rows, columns), added to the patch embedding's output.
        local: makes a module of such maps for a block, see `Block`.

    forward: (B, 3, H, W) -> (B, C, rows, columns), a view of the (B, rows, columns, C) token map,
    hence in channels_last memory.
    """

    pos_grid: torch.Tensor

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        mlp_hidden: int,
        image_size: tuple[int, int],
        patch_stride: int,
        attentions: list[dict[str, Any]],
        drop_path: float,
        layer_norm_eps: float,
        refine: nn.Module | None = None,
        local: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(dim, patch_stride)
        self.refine = refine
        self.grid = self.patch_embed.grid(image_size)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1] + 1, dim))
        self.register_buffer("pos_grid", torch.tensor(self.grid))
        if any(attentions):
            self.register_buffer("windows", window_table(attentions))
        if patch_stride != PATCH_SIZE:
            self.register_buffer("patch_stride", torch.tensor(patch_stride))
        last = max(len(attentions) - 1, 1)
        self.blocks = nn.ModuleList(
            Block(
                WindowAttention(dim, num_heads, **arguments),
                dim,
                mlp_hidden,
                drop_path * layer / last,
                layer_norm_eps,
                None if local is None else local(),
            )
            for layer, arguments in enumerate(attentions)
        )
        self.last_norm = AddLayerNorm(dim, eps=layer_norm_eps)
        self.register_load_state_dict_pre_hook(_check_grid)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """What is added to the tokens of a grid (rows, columns): (1, rows, columns, C)."""
        table = resize_position_table(self.pos_embed, self.grid, grid)
        return (table[:, 1:] + table[:, :1]).view(1, *grid, -1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(image)
        if self.refine is not None:
            x = x + on_map(self.refine, x)
        x = x + self.positions((x.shape[1], x.shape[2]))
        branch = None
        for block in self.blocks:
            x, branch = block(x, branch)
        _, y = self.last_norm(x, branch)
        features: torch.Tensor = y.permute(0, 3, 1, 2)
        return features


def window_table(attentions: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """The windows of each layer as integers (layers, 5), zeros for full attention.

    The columns are rows and columns of a window, rows and columns of its shift, and whether each
    window also sees the pooled ones.
    """
    rows = [
        [*layer["window"], *layer["shift"], int(layer["pooled"])] if layer else [0] * 5
        for layer in attentions
    ]
    return torch.tensor(rows)


def _check_grid(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *arguments: Any
) -> None:
    """Lets a state_dict of the official layout or of another form load strictly, and refuses a
    table of another grid."""
    assert isinstance(module, VisionTransformer)
    errors = arguments[-1]
    for name in ("windows", "patch_stride"):
        state_dict.pop(prefix + name, None)
        if name in module._buffers:
            state_dict[prefix + name] = module.get_buffer(name)
    grid = state_dict.setdefault(prefix + "pos_grid", torch.tensor(module.grid, device="cpu"))
    if tuple(grid.tolist()) != module.grid:
        errors.append(
            f"{prefix}pos_embed has the grid {tuple(grid.tolist())}; expected the model's "
            f"{module.grid}, to which kernelpose.load_checkpoint resizes it."
        )
