"""ViTPose S, B, L, H ("ViTPose: Simple Vision Transformer Baselines", arXiv 2204.12484)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from kernelpose.models.decoders import build_decoder, heatmap_size
from kernelpose.models.pose_model import PoseModel
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


class ViTPose(PoseModel):
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

    # As in the released code: the norm before belongs to a part, and to "mlp" what comes before the
    # blocks.
    parts: ClassVar[Mapping[str, Sequence[str]]] = {
        "attention": (".attn.", ".norm1."),
        "mlp": (".mlp.", ".norm2.", "patch_embed.", "pos_embed"),
        **PoseModel.parts,
    }

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
        if patch_stride not in PATCH_PADDING:
            raise ValueError(f"patch_stride is {patch_stride}; expected 16 or 8.")
        if not is_pair(image_size, patch_stride):
            raise ValueError(
                f"image_size is {image_size}; expected (height, width) of at least {patch_stride}."
            )
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path is {drop_path}; expected 0 <= drop_path < 1.")
        backbone = VisionTransformer(
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
        super().__init__(
            backbone,
            head=partial(
                build_decoder,
                decoder,
                embed_dim,
                upsample=patch_stride // 4,
                deconv_channels=deconv_channels,
            ),
            num_keypoints=num_keypoints,
            image_size=image_size,
            heatmap_size=heatmap_size(backbone.grid, patch_stride // 4),
            least_side=patch_stride,
        )


def is_pair(value: object, least: int) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(side, int) and side >= least for side in value)
    )


def layer_attentions(
    depth: int, *, attention: str, window: tuple[int, int] | None, num_full_layers: int
) -> list[dict[str, Any]]:
    """The arguments of `WindowAttention`, layer by layer; arguments as `ViTPose` has them."""
    if attention not in ATTENTIONS:
        raise ValueError(f"attention is {attention!r}; expected one of {', '.join(ATTENTIONS)}.")
    if depth < 1:
        raise ValueError(f"depth is {depth}; expected at least 1.")
    if window is not None and not is_pair(window, 1):
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
def _build(name: str, **options: Any) -> ViTPose:
    return ViTPose(**{**SIZES[name], **options})
