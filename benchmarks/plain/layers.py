"""What more than one of the plain models is made of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class ConvNorm(nn.Sequential):
    """A convolution without bias, its BatchNorm, and an activation, if any."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        act: nn.Module | None = None,
        norm_name: str = "norm",
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.add_module(norm_name, nn.BatchNorm2d(out_channels))
        if act is not None:
            self.act = act


class Decoder(nn.Module):
    """Deconvolutions with BatchNorm and ReLU, and a 1x1 convolution to heatmaps."""

    def __init__(self, width: int, channels: Sequence[int], num_keypoints: int) -> None:
        super().__init__()
        self.deconv_layers = nn.Sequential()
        for out in channels:
            self.deconv_layers.append(nn.ConvTranspose2d(width, out, 4, 2, 1, bias=False))
            self.deconv_layers.append(nn.BatchNorm2d(out))
            self.deconv_layers.append(nn.ReLU(inplace=True))
            width = out
        self.final_layer = nn.Conv2d(width, num_keypoints, 1)

    def forward(self, x: Tensor) -> Tensor:
        heatmaps: Tensor = self.final_layer(self.deconv_layers(x))
        return heatmaps
