"""Decoders: from the feature map of an encoder to one heatmap a keypoint, or to SimCC logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from kernelpose.nn.deconvolution import DeconvNormRelu
from kernelpose.nn.untouched import unhooked


class ClassicDecoder(nn.Module):
    """Deconvolutions (kernel 4, stride 2) with BatchNorm and ReLU, then a 1x1 convolution.

    The decoder of "Simple Baselines for Human Pose Estimation", ViTPose's classic one. Each entry
    of `channels` is the width of one deconvolution and doubles the resolution. Parameter names are
    the released code's: deconv_layers.{0,1,3,4,...} and final_layer.

    forward: (B, in_channels, h, w) -> (B, num_keypoints, h * 2^n, w * 2^n), n = len(channels).
    """

    def __init__(
        self, in_channels: int, num_keypoints: int, channels: Sequence[int] = (256, 256)
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_channels
        for out in channels:
            layers += [
                nn.ConvTranspose2d(width, out, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
            ]
            width = out
        self.deconv_layers = nn.Sequential(*layers)
        # Else maps in channels_last memory make oneDNN arrange these weights anew in every call: of
        # one image and 640 channels that is half the time.
        nn.utils.convert_conv2d_weight_memory_format(self.deconv_layers, torch.channels_last)
        self._fused = [DeconvNormRelu() for _ in channels]
        self.final_layer = nn.Conv2d(width, num_keypoints, 1)
        _init(self)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if not unhooked(self.deconv_layers):
            maps = self.deconv_layers(features)
        else:
            layers, maps = tuple(self.deconv_layers), features
            for fused, deconv, norm, relu in zip(
                self._fused, layers[::3], layers[1::3], layers[2::3], strict=True
            ):
                whole = fused.suits(maps, deconv, norm, relu)
                maps = fused(maps, deconv, norm) if whole else relu(norm(deconv(maps)))
        heatmaps: torch.Tensor = self.final_layer(maps)
        return heatmaps


class SimpleDecoder(nn.Module):
    """ReLU, bilinear upsampling, then a 3x3 convolution: ViTPose's simple decoder.

    forward: (B, in_channels, h, w) -> (B, num_keypoints, h * upsample, w * upsample).
    """

    def __init__(self, in_channels: int, num_keypoints: int, upsample: int = 4) -> None:
        super().__init__()
        self.upsample = upsample
        self.final_layer = nn.Conv2d(in_channels, num_keypoints, 3, padding=1)
        _init(self)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = F.interpolate(
            F.relu(features), scale_factor=self.upsample, mode="bilinear", align_corners=False
        )
        heatmaps: torch.Tensor = self.final_layer(features)
        return heatmaps


class SimCCHead(nn.Module):
    """A 1x1 convolution to one map a keypoint, then one linear for each axis, to logits of bins.

    Li et al., "SimCC: a Simple Coordinate Classification Perspective for Human Pose Estimation",
    2022; no upsampling. Names are those of mmpose's SimCCHead without its deconvolutions.

    Args:
        in_channels: width of the encoder's map.
        num_keypoints: joints.
        grid: (h, w) of the encoder's map.
        image_size: (height, width) of the input.
        split_ratio: bins per pixel.

    forward: (B, in_channels, h, w) -> (B, K, width bins), (B, K, height bins).
    """

    def __init__(
        self,
        in_channels: int,
        num_keypoints: int,
        *,
        grid: tuple[int, int],
        image_size: tuple[int, int],
        split_ratio: float = 2.0,
    ) -> None:
        super().__init__()
        check_num_keypoints(num_keypoints)
        if not split_ratio > 0:
            raise ValueError(f"split_ratio is {split_ratio}; expected a positive number.")
        rows, columns = (round(side * split_ratio) for side in image_size)
        self.final_layer = nn.Conv2d(in_channels, num_keypoints, 1)
        self.mlp_head_x = nn.Linear(grid[0] * grid[1], columns)
        self.mlp_head_y = nn.Linear(grid[0] * grid[1], rows)
        _init(self)
        for linear in (self.mlp_head_x, self.mlp_head_y):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.final_layer(features).flatten(2)
        return self.mlp_head_x(maps), self.mlp_head_y(maps)


def build_decoder(
    name: str,
    in_channels: int,
    num_keypoints: int,
    *,
    upsample: int,
    deconv_channels: Sequence[int] | None = None,
) -> nn.Module:
    """A decoder to heatmaps that gains a factor of `upsample` (a power of two).

    Args:
        name: "classic" or "simple".
        in_channels: width of the encoder's map.
        num_keypoints: number of heatmaps.
        upsample: heatmap size over map size.
        deconv_channels: widths of the classic decoder's deconvolutions; 256 each by default.

    Raises ValueError for another name, and for a number of widths that does not reach `upsample`.
    """
    check_num_keypoints(num_keypoints)
    if name == "simple":
        if deconv_channels is not None:
            raise ValueError(
                f"deconv_channels is {tuple(deconv_channels)}; expected None with decoder='simple'."
            )
        return SimpleDecoder(in_channels, num_keypoints, upsample)
    if name == "classic":
        layers = upsample.bit_length() - 1
        channels = tuple(deconv_channels) if deconv_channels is not None else (256,) * layers
        if 2 ** len(channels) != upsample:
            raise ValueError(
                f"deconv_channels is {channels}; expected {layers} widths, to gain a factor of "
                f"{upsample}."
            )
        return ClassicDecoder(in_channels, num_keypoints, channels)
    raise ValueError(f"decoder is {name!r}; expected 'classic' or 'simple'.")


def heatmap_size(grid: tuple[int, int], upsample: int) -> tuple[int, int]:
    """(height, width) of the heatmaps that `build_decoder`'s decoders make of a map (h, w)."""
    return grid[0] * upsample, grid[1] * upsample


def check_num_keypoints(number: object) -> None:
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"num_keypoints is {number!r}; expected an integer of at least 1.")


def _init(decoder: nn.Module) -> None:
    for module in decoder.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, std=0.001)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
