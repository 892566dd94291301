"""An encoder and one decoder for each data set: what the heatmap models have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn

from kernelpose.models.decoders import build_decoder


class HeatmapModel(nn.Module):
    """Normalised images to one heatmap a keypoint.

    Its encoder is `backbone`, its decoder `keypoint_head`, or keypoint_heads.<data set> of several.

    Args:
        backbone: (B, 3, H, W) images to (B, channels, h, w) features.
        channels, grid: of the features, grid as (h, w) for an image of `image_size`.
        num_keypoints: joints, or {data set: joints} for one decoder each on the one encoder.
        image_size: (height, width) that the model is made for.
        least_side: of an image, in pixels.
        upsample: heatmap size over feature size.
        decoder, deconv_channels: see `kernelpose.models.decoders.build_decoder`.

    Raises ValueError, with the argument's name, for a value out of its range.
    """

    # By part that `freeze` takes: what the names of its parameters in the encoder contain.
    parts: ClassVar[Mapping[str, Sequence[str]]] = {"encoder": ("",)}

    def __init__(
        self,
        backbone: nn.Module,
        *,
        channels: int,
        grid: tuple[int, int],
        num_keypoints: int | Mapping[str, int],
        image_size: tuple[int, int],
        least_side: int,
        upsample: int,
        decoder: str,
        deconv_channels: Sequence[int] | None,
    ) -> None:
        super().__init__()
        if isinstance(num_keypoints, Mapping) and (
            not num_keypoints or not all(map(_can_name_a_decoder, num_keypoints))
        ):
            raise ValueError(
                f"num_keypoints is {dict(num_keypoints)}; expected at least one data set, its name "
                "without a dot and no attribute of nn.ModuleDict."
            )
        self.num_keypoints = num_keypoints
        self.image_size = tuple(image_size)
        self.heatmap_size = tuple(side * upsample for side in grid)
        self.least_side = least_side
        self.backbone = backbone

        def head(keypoints: int) -> nn.Module:
            return build_decoder(
                decoder, channels, keypoints, upsample=upsample, deconv_channels=deconv_channels
            )

        if isinstance(num_keypoints, Mapping):
            self.keypoint_heads = nn.ModuleDict({k: head(v) for k, v in num_keypoints.items()})
        else:
            self.keypoint_head = head(num_keypoints)

    def forward(self, images: torch.Tensor, dataset: str | None = None) -> torch.Tensor:
        """Heatmaps of normalised images.

        Args:
            images: (B, 3, H, W), the dtype of the weights (or any under autocast).
            dataset: whose decoder to run, where the model has several.

        Returns (B, K, H / 4, W / 4). Raises ValueError for another shape or data set.
        """
        least = self.least_side
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < least:
            raise ValueError(
                f"images has shape {tuple(images.shape)}; expected (B, 3, H, W), H, W >= {least}."
            )
        if not images.is_floating_point():
            raise TypeError(f"images is {images.dtype}; expected normalised floating-point values.")
        head = self._head(dataset)
        heatmaps: torch.Tensor = head(self.backbone(images))
        return heatmaps

    def _head(self, dataset: str | None) -> nn.Module:
        if isinstance(self.num_keypoints, Mapping):
            if dataset is None or dataset not in self.num_keypoints:
                names = ", ".join(self.num_keypoints)
                raise ValueError(f"dataset is {dataset!r}; expected one of {names}.")
            return self.keypoint_heads[dataset]
        if dataset is not None:
            raise ValueError(
                f"dataset is {dataset!r}; expected None, as the model has one decoder."
            )
        return self.keypoint_head

    def freeze(self, *parts: str) -> None:
        """Takes parts of the encoder out of training: some of the keys of `parts`.

        Undone by `requires_grad_(True)`. Raises ValueError for another part.
        """
        for part in parts:
            if part not in self.parts:
                raise ValueError(f"parts hold {part!r}; expected some of {', '.join(self.parts)}.")
        for name, parameter in self.backbone.named_parameters():
            if any(pattern in name for part in parts for pattern in self.parts[part]):
                parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> HeatmapModel:
        """As nn.Module, except that drop path does not disturb an encoder frozen as a whole."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval()
        return self


def _can_name_a_decoder(name: object) -> bool:
    return (
        bool(name)
        and isinstance(name, str)
        and "." not in name
        and not hasattr(nn.ModuleDict(), name)
    )
