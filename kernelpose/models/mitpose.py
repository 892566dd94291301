"""MiTPOSE B, L, H: a vision transformer with convolutions that refine and perceive locally.

Two layouts, since the sources contradict each other. "figure" follows the authors' figure and
README, with what they leave open chosen so that B has the published number of parameters;
"released" is the released backbone, layer by layer. Published for B, L, H: 90.1, 401.0, 604.3 M
parameters; "figure" has 90.0, 315.4, 654.0, and "released" 151.3, 442.6, 872.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from kernelpose.models.decoders import build_decoder, heatmap_size
from kernelpose.models.mitpose_released import ReleasedTransformer
from kernelpose.models.pose_model import PoseModel
from kernelpose.models.vit import PATCH_SIZE, VisionTransformer
from kernelpose.models.vitpose import SIZES as VITPOSE_SIZES
from kernelpose.models.vitpose import is_pair
from kernelpose.models.zoo import register
from kernelpose.nn import LocalPerception, ScConv

# Widths, depths, heads and drop path of the ViTPose of the same letter.
SIZES: dict[str, dict[str, Any]] = {
    f"mitpose-{letter}": VITPOSE_SIZES[f"vitpose-{letter}"] for letter in "blh"
}

LAYOUTS = ("figure", "released")


class MiTPOSE(PoseModel):
    """One heatmap a keypoint, from a vision transformer with convolutions inside.

    Layout "figure": x + GRN(CRU(SRU(x))) once, after the patch embedding; in each block local
    perception between attention and MLP, on the first norm used a second time. Its names are those
    of ViTPose, with backbone.refine and backbone.blocks.i.local beside, so that weights of ViTPose
    and MAE load into the rest.

    Layout "released": a dense multi-scale module once, after the patch embedding; in each block
    SCConv between attention and MLP. The names of the backbone are those of the released code, as
    mmpretrain saves it.

    Args:
        embed_dim, depth, num_heads, mlp_ratio: sizes of the encoder.
        layout: "figure" or "released".
        num_keypoints: joints, or {data set: joints} for one decoder each on the one encoder.
        image_size: (height, width) that the position table is made for. Other sizes run too, with
            the table resampled.
        decoder, deconv_channels: see `kernelpose.models.decoders.build_decoder`.
        drop_path: stochastic depth of the last layer, linear from 0; it acts in training alone.
        layer_norm_eps: of every LayerNorm.

    Raises ValueError, with the argument's name, for a value out of its range.
    """

    parts: ClassVar[Mapping[str, Sequence[str]]] = {
        "attention": (".attn.", ".norm1.", ".ln1."),
        "mlp": (".mlp.", ".ffn.", ".norm2.", ".ln2.", "patch_embed.", "pos_embed"),
        **PoseModel.parts,
    }

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        layout: str = "figure",
        num_keypoints: int | Mapping[str, int] = 17,
        image_size: tuple[int, int] = (256, 192),
        decoder: str = "simple",
        deconv_channels: Sequence[int] | None = None,
        drop_path: float = 0.0,
        layer_norm_eps: float = 1e-6,
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}; expected {' or '.join(LAYOUTS)}.")
        if depth < 1:
            raise ValueError(f"depth is {depth}; expected at least 1.")
        if not is_pair(image_size, PATCH_SIZE):
            raise ValueError(
                f"image_size is {image_size}; expected (height, width) of at least {PATCH_SIZE}."
            )
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path is {drop_path}; expected 0 <= drop_path < 1.")
        sizes: dict[str, Any] = {
            "dim": embed_dim,
            "num_heads": num_heads,
            "mlp_hidden": round(embed_dim * mlp_ratio),
            "image_size": image_size,
            "drop_path": drop_path,
            "layer_norm_eps": layer_norm_eps,
        }
        backbone: VisionTransformer | ReleasedTransformer
        if layout == "released":
            backbone = ReleasedTransformer(depth=depth, **sizes)
        else:
            backbone = VisionTransformer(
                patch_stride=PATCH_SIZE,
                attentions=[{} for _ in range(depth)],
                refine=ScConv(embed_dim, grn=True),
                local=partial(LocalPerception, embed_dim),
                **sizes,
            )
        super().__init__(
            backbone,
            head=partial(
                build_decoder,
                decoder,
                embed_dim,
                upsample=PATCH_SIZE // 4,
                deconv_channels=deconv_channels,
            ),
            num_keypoints=num_keypoints,
            image_size=image_size,
            heatmap_size=heatmap_size(backbone.grid, PATCH_SIZE // 4),
            least_side=PATCH_SIZE,
        )


@register(*SIZES, *(f"{name}-released" for name in SIZES))
def _build(name: str, **options: Any) -> MiTPOSE:
    layout = "released" if name.endswith("-released") else "figure"
    return MiTPOSE(**{**SIZES[name.removesuffix("-released")], "layout": layout, **options})
