"""An encoder and one decoder for each data set: what the pose models have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn


class PoseModel(nn.Module):
    """Normalised images to one heatmap a keypoint, or to SimCC logits over columns and rows.

    Its encoder is `backbone`, its decoder `keypoint_head`, or keypoint_heads.<data set> of several.

    Args:
        backbone: (B, 3, H, W) images to (B, C, h, w) features.
        head: makes a decoder of those features for a number of keypoints.
        num_keypoints: joints, or {data set: joints} for one decoder each on the one encoder.
        image_size: (height, width) that the model is made for.
        heatmap_size: (height, width) of the heatmaps of such an image; None for a decoder that
            gives SimCC logits, and takes images of that size alone.
        least_side: of an image, in pixels.

    Raises ValueError, with the argument's name, for a value out of its range.
    """

    # By part that `freeze` takes: what the names of its parameters in the encoder contain.
    parts: ClassVar[Mapping[str, Sequence[str]]] = {"encoder": ("",)}

    def __init__(
        self,
        backbone: nn.Module,
        *,
        head: Callable[[int], nn.Module],
        num_keypoints: int | Mapping[str, int],
        image_size: tuple[int, int],
        heatmap_size: tuple[int, int] | None,
        least_side: int,
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
        self.heatmap_size = heatmap_size
        self.least_side = least_side
        self.backbone = backbone
        if isinstance(num_keypoints, Mapping):
            self.keypoint_heads = nn.ModuleDict({k: head(v) for k, v in num_keypoints.items()})
        else:
            self.keypoint_head = head(num_keypoints)

    def forward(
        self, images: torch.Tensor, dataset: str | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Heatmaps, or SimCC logits, of normalised images.

        Args:
            images: (B, 3, H, W), the dtype of the weights (or any under autocast).
            dataset: whose decoder to run, where the model has several.

        Returns heatmaps (B, K, H / 4, W / 4), or logits (B, K, bins of the width) and (B, K, bins
        of the height). Raises ValueError for another shape or data set.
        """
        least = self.least_side
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < least:
            raise ValueError(
                f"images has shape {tuple(images.shape)}; expected (B, 3, H, W), H, W >= {least}."
            )
        if self.heatmap_size is None and tuple(images.shape[2:]) != self.image_size:
            raise ValueError(
                f"images has shape {tuple(images.shape)}; expected (B, 3, {self.image_size[0]}, "
                f"{self.image_size[1]}), the size whose bins the SimCC decoder has."
            )
        if not images.is_floating_point():
            raise TypeError(f"images is {images.dtype}; expected normalised floating-point values.")
        head = self._head(dataset)
        found: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = head(self.backbone(images))
        return found

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

    def record_image_size(self) -> None:
        """Puts image_size into the state_dict, where no shape tells it, as the buffer `input_size`.

        Loading a state_dict leaves the model's own.
        """
        self.register_buffer("input_size", torch.tensor(self.image_size))
        self.register_load_state_dict_pre_hook(_keep_input_size)

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

    def train(self, mode: bool = True) -> PoseModel:
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


def _keep_input_size(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state_dict[prefix + "input_size"] = module.get_buffer("input_size")
