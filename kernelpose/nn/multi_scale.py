"""The dense multi-scale module of the released MiTPOSE code, with the gates it ends in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpose.nn.folding import Folder, bias_of
from kernelpose.nn.untouched import has_geometry, untouched
from kernelpose.ops._register import is_plain, no_autocast

_KERNELS = (1, 7, 5, 3, 1)  # of the layers that `MultiScaleModule` folds


class ChannelAttention(nn.Module):
    """The channel gate of CBAM: maps (B, C, H, W) -> (B, C, 1, 1), between 0 and 1."""

    def __init__(self, in_planes: int, ratio: int = 16) -> None:
        super().__init__()
        if in_planes < ratio:
            raise ValueError(f"ratio is {ratio}; expected no more than the {in_planes} channels.")
        self.fc1 = nn.Conv2d(in_planes, in_planes // ratio, 1, bias=False)
        self.fc2 = nn.Conv2d(in_planes // ratio, in_planes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True))
        mean, largest = (self.fc2(F.relu(self.fc1(p))) for p in pooled)
        return torch.sigmoid(mean + largest)


class SpatialAttention(nn.Module):
    """The spatial gate of CBAM: maps (B, C, H, W) -> (B, 1, H, W), between 0 and 1."""

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)
        return torch.sigmoid(self.conv1(pooled))


class MultiScaleModule(nn.Module):
    """Tokens (B, H·W, C) or maps (B, C, H, W) -> the same shape.

    y = x + conv_1x1_final1 of [7x7, 5x5, 3x3 convolutions of conv_1x1_init of x]; the result is
    y + conv_1x1_final2 of [CA(y) y, SA(y) y]. Constructor and state_dict are those of the released
    MiTPOSE code, whose map is always 16x12.

    Up to y nothing but x is not linear: in eval mode, where no gradient is wanted and nothing
    traces, one 7x7 convolution and a map of biases compute it (see `fold`), of 0.56 of the
    products. They are made anew when a parameter has changed, which its `.data` does unseen.

    Args:
        in_channels, out_channels: C, both.
        map_size: (H, W) of the map whose tokens come; maps may have any size.

    Raises:
        ValueError: the channels differ; or, when called, the shape of x does not fit.
    """

    def __init__(
        self, in_channels: int, out_channels: int, map_size: tuple[int, int] = (16, 12)
    ) -> None:
        super().__init__()
        if in_channels != out_channels:
            raise ValueError(
                f"out_channels is {out_channels}; expected {in_channels}, as in_channels: the "
                "input is added to the result."
            )
        self.map_size = map_size
        self.conv_1x1_init = nn.Conv2d(in_channels, in_channels, 1)
        self.conv_7x7 = nn.Conv2d(in_channels, out_channels, 7, padding=3)
        self.conv_5x5 = nn.Conv2d(in_channels, out_channels, 5, padding=2)
        self.conv_3x3 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv_1x1_final1 = nn.Conv2d(3 * out_channels, out_channels, 1)
        self.CA = ChannelAttention(in_channels)
        self.SA = SpatialAttention()
        self.conv_1x1_final2 = nn.Conv2d(2 * out_channels, out_channels, 1)
        self._folder = Folder(_fold)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return self._of_maps(x)
        height, width = self.map_size
        if x.ndim != 3 or x.shape[1] != height * width:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected (B, {height * width}, C), the tokens of a "
                f"map of {height}x{width}, or maps (B, C, H, W)."
            )
        maps = x.unflatten(1, self.map_size).permute(0, 3, 1, 2)
        return self._of_maps(maps).flatten(2).transpose(1, 2)

    def _of_maps(self, x: Tensor) -> Tensor:
        layers = self._linear_layers()
        if (
            not self.training
            and untouched(*layers)
            and all(
                has_geometry(layer, kernel, padding=kernel // 2)
                for layer, kernel in zip(layers, _KERNELS, strict=True)
            )
            and is_plain(x, *self.parameters())
        ):
            weight, bias = self.fold((x.shape[2], x.shape[3]))
            y = F.conv2d(x, weight, padding=3) + bias + x
        else:
            init, *branches, final = layers
            first = init(x)
            y = final(torch.cat([branch(first) for branch in branches], 1)) + x
        gated = torch.cat((self.CA(y) * y, self.SA(y) * y), 1)
        out: Tensor = self.conv_1x1_final2(gated) + y
        return out

    def fold(self, map_size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """weight (C, C, 7, 7) and bias (C, H, W) with y = conv2d(x, weight, padding=3) + bias + x.

        The bias depends on the place: the zeros around the convolutions' input are none of
        conv_1x1_init's results, which would have its bias.

        Args:
            map_size: (H, W); `self.map_size` where it is None.
        """
        ((weight, border, constant),) = self._folder([self._linear_layers()])
        with no_autocast(weight):
            inside = border.new_ones(1, 1, *(map_size or self.map_size))
            bias = F.conv2d(inside, border, constant, padding=3)[0]
        return weight, bias.to(weight.dtype)

    def _linear_layers(self) -> tuple[nn.Conv2d, ...]:
        branches = (self.conv_7x7, self.conv_5x5, self.conv_3x3)
        return self.conv_1x1_init, *branches, self.conv_1x1_final1


def _fold(
    first: nn.Conv2d, seven: nn.Conv2d, five: nn.Conv2d, three: nn.Conv2d, last: nn.Conv2d
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the layers up to y: weight (C, C, 7, 7); border (C, 1, 7, 7), what the first bias gives
    through each tap that is on the map; constant (C,), what the other biases give."""
    dtype = torch.promote_types(seven.weight.dtype, torch.float32)
    mixes, before = (layer.weight.to(dtype)[:, :, 0, 0] for layer in (last, first))
    mixed, constant = before.new_zeros(()), bias_of(last).to(dtype)
    for mix, branch in zip(mixes.chunk(3, 1), (seven, five, three), strict=True):
        weight = (mix @ branch.weight.to(dtype).flatten(1)).view(branch.weight.shape)
        mixed = mixed + F.pad(weight, [3 - branch.kernel_size[0] // 2] * 4)
        constant = constant + mix @ bias_of(branch).to(dtype)
    taps = mixed.permute(0, 2, 3, 1)  # (C, 7, 7, C), its last for the first convolution
    border = (taps @ bias_of(first).to(dtype))[:, None]
    whole = (taps @ before).permute(0, 3, 1, 2).contiguous()
    return whole.to(seven.weight.dtype), border, constant
