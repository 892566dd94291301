"""ViTPose S, B, L, H ("ViTPose: Simple Vision Transformer Baselines", arXiv 2204.12484)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kernelpose.models.decoders import build_decoder
from kernelpose.models.vit import PATCH_PADDING, VisionTransformer
from kernelpose.models.zoo import register

# Sizes and drop path of the released configurations; S has 12 heads of 32.
SIZES: dict[str, dict[str, Any]] = {
    "vitpose-s": {"embed_dim": 384, "depth": 12, "num_heads": 12, "drop_path": 0.10},
    "vitpose-b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "drop_path": 0.30},
    "vitpose-l": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "drop_path": 0.50},
    "vitpose-h": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "drop_path": 0.55},
}

ATTENTIONS = ("full", "window", "window+shift", "window+pool", "window+shift+pool")

# By default, by patch_stride.
_WINDOWS = {16: (8, 6), 8: (8, 8)}

# What `freeze` takes from the released code: the parts of a block, and for "mlp" also what comes
# before the blocks.
_FREEZE = {
    "attention": (".attn.", ".norm1."),
    "mlp": (".mlp.", ".norm2.", "patch_embed.", "pos_embed"),
    "encoder": ("",),
}


class ViTPose(nn.Module):
    """A plain vision transformer and a light decoder: one heatmap a keypoint.

    The state_dict has the names of the released code (backbone.patch_embed.proj, pos_embed,
    blocks.i.{norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2}, last_norm;
    keypoint_head.deconv_layers.*, final_layer), so that optimizers which group parameters by name
    go on working. It differs in two places: buffers hold what no shape tells (backbone.pos_grid the
    (rows, columns) of the position table, backbone.windows and backbone.patch_stride a form other
    than the released one), and several decoders are keypoint_heads.<data set>.*.

    Args:
        embed_dim, depth, num_heads, mlp_ratio: sizes of the encoder.
        num_keypoints: joints, or {data set: joints} for one decoder each on the one encoder.
        image_size: (height, width) that the position table is made for. Other sizes run too, with
            the table resampled. What is left of a side over a multiple of `patch_stride` is not
            seen, as in the released code.
        patch_stride: 16, or 8 for features at 1/8; heatmaps are a quarter of the image for both.
        attention: "full", "window", "window+shift" (every second layer is shifted by half a
            window), "window+pool" (each window also sees every window's mean key and value) or
            "window+shift+pool".
        window: (rows, columns) of a window; (8, 8) at 1/8 and (8, 6) at 1/16 by default.
        num_full_layers: of the layers of a windowed form, how many attend to the whole map. They
            are evenly spaced and end with the last: 4 of 12 are layers 3, 6, 9 and 12.
        decoder, deconv_channels: see `kernelpose.models.decoders.build_decoder`.
        drop_path: stochastic depth of the last layer, linear from 0; it acts in training alone.
        layer_norm_eps: 1e-6; transformers runs its checkpoints with 1e-12.

    Raises ValueError, with the argument's name, for a value out of its range.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_keypoints: int | Mapping[str, int] = 17,
        image_size: tuple[int, int] = (256, 192),
        patch_stride: int = 16,
        attention: str = "full",
        window: tuple[int, int] | None = None,
        num_full_layers: int = 0,
        decoder: str = "classic",
        deconv_channels: Sequence[int] | None = None,
        drop_path: float = 0.0,
        layer_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if patch_stride not in PATCH_PADDING:
            raise ValueError(f"patch_stride is {patch_stride}; expected 16 or 8.")
        if not _is_pair(image_size, patch_stride):
            raise ValueError(
                f"image_size is {image_size}; expected (height, width) of at least {patch_stride}."
            )
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path is {drop_path}; expected 0 <= drop_path < 1.")
        if isinstance(num_keypoints, Mapping) and (
            not num_keypoints or not all(map(_can_name_a_decoder, num_keypoints))
        ):
            raise ValueError(
                f"num_keypoints is {dict(num_keypoints)}; expected at least one data set, its name "
                "without a dot and no attribute of nn.ModuleDict."
            )
        self.num_keypoints = num_keypoints
        self.image_size = tuple(image_size)
        self.backbone = VisionTransformer(
            dim=embed_dim,
            num_heads=num_heads,
            mlp_hidden=round(embed_dim * mlp_ratio),
            image_size=image_size,
            patch_stride=patch_stride,
            attentions=layer_attentions(
                depth,
                attention=attention,
                window=_WINDOWS[patch_stride] if window is None and attention != "full" else window,
                num_full_layers=num_full_layers,
            ),
            drop_path=drop_path,
            layer_norm_eps=layer_norm_eps,
        )
        upsample = patch_stride // 4
        self.heatmap_size = tuple(side * upsample for side in self.backbone.grid)

        def head(keypoints: int) -> nn.Module:
            return build_decoder(
                decoder,
                embed_dim,
                keypoints,
                upsample=upsample,
                deconv_channels=deconv_channels,
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
        least = self.backbone.patch_embed.stride
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
        """Takes parts of the encoder out of training.

        Args:
            parts: "attention" (attention and the norm before it), "mlp" (the MLPs, the norms
                before them, patch embedding and positions, as in the released code) or "encoder"
                (everything but the decoders).

        Undone by `requires_grad_(True)`. Raises ValueError for another part.
        """
        for part in parts:
            if part not in _FREEZE:
                raise ValueError(f"parts hold {part!r}; expected some of {', '.join(_FREEZE)}.")
        for name, parameter in self.backbone.named_parameters():
            if any(pattern in name for part in parts for pattern in _FREEZE[part]):
                parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> ViTPose:
        """As nn.Module, except that drop path does not disturb an encoder frozen as a whole."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval()
        return self


def _is_pair(value: object, least: int) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(side, int) and side >= least for side in value)
    )


def _can_name_a_decoder(name: object) -> bool:
    return (
        bool(name)
        and isinstance(name, str)
        and "." not in name
        and not hasattr(nn.ModuleDict(), name)
    )


def layer_attentions(
    depth: int, *, attention: str, window: tuple[int, int] | None, num_full_layers: int
) -> list[dict[str, Any]]:
    """The arguments of `WindowAttention`, layer by layer; arguments as `ViTPose` has them."""
    if attention not in ATTENTIONS:
        raise ValueError(f"attention is {attention!r}; expected one of {', '.join(ATTENTIONS)}.")
    if depth < 1:
        raise ValueError(f"depth is {depth}; expected at least 1.")
    if window is not None and not _is_pair(window, 1):
        raise ValueError(f"window is {window!r}; expected (rows, columns) of at least 1.")
    if attention == "full":
        if window is not None:
            raise ValueError(f"window is {window}; expected None with attention='full'.")
        if num_full_layers:
            raise ValueError(
                f"num_full_layers is {num_full_layers}; expected 0 with attention='full'."
            )
        return [{} for _ in range(depth)]
    assert window is not None
    if num_full_layers < 0 or (num_full_layers and depth % num_full_layers):
        raise ValueError(
            f"num_full_layers is {num_full_layers}; expected 0 or a divisor of the depth {depth}."
        )
    forms = attention.split("+")
    full_every = depth // num_full_layers if num_full_layers else depth + 1
    layers: list[dict[str, Any]] = []
    for layer in range(1, depth + 1):
        if layer % full_every == 0:
            layers.append({})
        else:
            shifted = "shift" in forms and layer % 2 == 0
            layers.append(
                {
                    "window": window,
                    "shift": (window[0] // 2, window[1] // 2) if shifted else (0, 0),
                    "pooled": "pool" in forms,
                }
            )
    return layers


@register(*SIZES)
def _build(
    name: str,
    *,
    num_keypoints: int | Mapping[str, int],
    image_size: tuple[int, int],
    decoder: str | None,
    **options: Any,
) -> ViTPose:
    return ViTPose(
        **{
            **SIZES[name],
            "num_keypoints": num_keypoints,
            "image_size": image_size,
            "decoder": decoder or "classic",
            **options,
        }
    )
