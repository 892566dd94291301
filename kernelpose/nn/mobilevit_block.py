"""The MobileViT block as a drop-in module: convolutions around a transformer of strided groups."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from kernelpose import ops
from kernelpose.nn.add_layer_norm import AddLayerNorm
from kernelpose.nn.conv_norm import ConvNorm
from kernelpose.nn.window_attention import WindowAttention
from kernelpose.nn.winograd import WinogradConv

# By variant, what its code calls the BatchNorm of a convolution.
NORM_NAMES = {"released": "norm_layer", "apple": "bn"}
VARIANTS = tuple(NORM_NAMES)

PATCH = (2, 2)  # tokens at the same place of each patch attend to each other
_HEAD_DIM = 32  # of the one head of variant "released"
_HEADS = 4  # of variant "apple"
_DROPOUT = 0.1  # of variant "released"


class MobileViTBlock(nn.Module):
    """Maps (B, C, H, W) -> maps (B, out_channels, H, W), every token having seen the whole map.

    Two convolutions, a transformer whose attention runs among the tokens at the same place of each
    2x2 patch, and two convolutions more, the last one beside the input ("MobileViT", arXiv
    2110.02178). Attention reads its groups from the map: nothing is unfolded or folded.

    Variant "released" is the block of the released MobileViTPose code: one head of 32, scores
    scaled by the token width ** -0.5, no norm after the transformer, bare last convolutions. On a
    map of an odd side, where that code stops, the groups differ by a row or column. Variant
    "apple" is the paper's, as timm has it: four heads of the usual scale, a norm after the
    transformer, BatchNorm and SiLU in every convolution but the projection to tokens. Constructor
    and state_dict are those of the released code, the state_dict of "apple" timm's.

    Args:
        in_channels, out_channels: of the maps.
        d_model: width of a token.
        layers: of the transformer.
        mlp_dim: hidden width of its feed-forward networks.
        variant: "released" or "apple".

    Raises:
        ValueError: another variant; in forward, a map of an odd side for "apple", where timm
            resamples it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        d_model: int,
        layers: int,
        mlp_dim: int,
        *,
        variant: str = "released",
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}; expected one of {', '.join(VARIANTS)}.")
        self.variant = variant
        convolution = partial(ConvNorm, act=nn.SiLU(), norm_name=NORM_NAMES[variant])
        if variant == "released":
            self.local_representation = nn.Sequential(
                convolution(in_channels, in_channels, 3), convolution(in_channels, d_model)
            )
            self.transformer: nn.Module = _Transformer(d_model, layers, mlp_dim)
            self.fusion_block1 = nn.Conv2d(d_model, in_channels, 1)
            self.fusion_block2 = nn.Conv2d(2 * in_channels, out_channels, 3, padding=1)
            self._winograd = WinogradConv()
        else:
            self.conv_kxk = convolution(in_channels, in_channels, 3)
            self.conv_1x1 = nn.Conv2d(in_channels, d_model, 1, bias=False)
            self.transformer = nn.ModuleList(_Layer(d_model, mlp_dim) for _ in range(layers))
            self.norm = AddLayerNorm(d_model)
            self.conv_proj = convolution(d_model, in_channels)
            self.conv_fusion = convolution(2 * in_channels, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.variant == "released":
            tokens = self.transformer(self.local_representation(x).permute(0, 2, 3, 1))
            y = self.fusion_block1(tokens.permute(0, 3, 1, 2))
            joined, last = torch.cat([x, y], 1), self.fusion_block2
            if self._winograd.suits(joined, last):
                return self._winograd(joined, last)
            out: Tensor = last(joined)
        else:
            if x.shape[2] % PATCH[0] or x.shape[3] % PATCH[1]:
                raise ValueError(
                    f"x has shape {tuple(x.shape)}; expected (B, C, H, W), H and W even."
                )
            tokens, branch = self.conv_1x1(self.conv_kxk(x)).permute(0, 2, 3, 1), None
            for layer in self.transformer.children():
                tokens, branch = layer(tokens, branch)
            _, tokens = self.norm(tokens, branch)
            y = self.conv_proj(tokens.permute(0, 3, 1, 2))
            out = self.conv_fusion(torch.cat([x, y], 1))
        return out


class StridedAttention(nn.Module):
    """Tokens (B, H, W, dim) -> the same shape: attention of one head of 32 in strided groups."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.to_qvk = nn.Linear(
            dim, 3 * _HEAD_DIM, bias=False
        )  # queries, keys, values all the same
        self.w_out = nn.Linear(_HEAD_DIM, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        attended = ops.window_attention(
            self.to_qvk(x), num_heads=1, window=PATCH, partition="grid", scale=self.scale
        )
        y: Tensor = self.w_out(attended)
        return y


class _Transformer(nn.Module):
    """Layers of attention and feed-forward, each added to its input, in the released names."""

    def __init__(self, dim: int, layers: int, mlp_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _PreNorm(dim, StridedAttention(dim)),
                    _PreNorm(dim, _FeedForward(dim, mlp_dim)),
                ]
            )
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        branch = None
        for layer in self.layers:
            for part in layer.children():
                x, branch = part(x, branch)
        return x if branch is None else x + branch


class _PreNorm(nn.Module):
    """(x, branch) -> (x + branch, fn of its LayerNorm), for the next norm to add."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = AddLayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        x, y = self.norm(x, branch)
        return x, self.fn(y)


class _FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.SiLU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(hidden, dim),
            nn.Dropout(_DROPOUT),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class _Layer(nn.Module):
    """As two `_PreNorm`, in timm's names."""

    def __init__(self, dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.norm1 = AddLayerNorm(dim)
        self.attn = WindowAttention(dim, _HEADS, window=PATCH, partition="grid")
        self.norm2 = AddLayerNorm(dim)
        self.mlp = _Mlp(dim, mlp_dim)

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        x, y = self.norm1(x, branch)
        x, y = self.norm2(x, self.attn(y))
        return x, self.mlp(y)


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.SiLU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y
