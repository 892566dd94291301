"""MobileViTPose S, XXS: MobileViT and a decoder to heatmaps (repository jody1188/MobileViTPose)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from kernelpose.models.decoders import build_decoder, heatmap_size
from kernelpose.models.mobilevit import STRIDE, MobileViT, divisor
from kernelpose.models.pose_model import PoseModel
from kernelpose.models.vitpose import is_pair
from kernelpose.models.zoo import register
from kernelpose.nn.mobilevit_block import VARIANTS

SIZES: dict[str, dict[str, Any]] = {
    "mobilevitpose-xxs": {
        "features_list": (16, 16, 24, 24, 48, 48, 64, 64, 80, 80, 320),
        "d_list": (64, 80, 96),
        "transformer_depth": (2, 4, 3),
        "expansion": 2,
    },
    "mobilevitpose-s": {
        "features_list": (16, 32, 64, 64, 96, 96, 128, 128, 160, 160, 640),
        "d_list": (144, 192, 240),
        "transformer_depth": (2, 4, 3),
        "expansion": 4,
    },
}


class MobileViTPose(PoseModel):
    """One heatmap a keypoint, a quarter of the image's size, from a MobileViT.

    The classic decoder, three deconvolutions, is the one that has the published number of
    parameters; the released configuration of today names a bilinear head, which is "simple" here.

    The buffer input_size records (height, width), which no shape tells; loading leaves it.

    Args:
        features_list, d_list, transformer_depth, expansion: see `kernelpose.models.MobileViT`.
        variant: "released", or "apple" for the MobileViT of the paper and timm, whose ImageNet
            weights load.
        num_keypoints: joints, or {data set: joints} for one decoder each on the one encoder.
        image_size: (height, width), divisible by 32, for "apple" by 64. Other such sizes run too.
        decoder, deconv_channels: see `kernelpose.models.decoders.build_decoder`.

    Raises ValueError, with the argument's name, for a value out of its range.
    """

    def __init__(
        self,
        *,
        features_list: Sequence[int],
        d_list: Sequence[int],
        transformer_depth: Sequence[int],
        expansion: int,
        variant: str = "released",
        num_keypoints: int | Mapping[str, int] = 17,
        image_size: tuple[int, int] = (256, 192),
        decoder: str = "classic",
        deconv_channels: Sequence[int] | None = None,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}; expected one of {', '.join(VARIANTS)}.")
        unit = divisor(variant)
        if not is_pair(image_size, unit) or any(side % unit for side in image_size):
            raise ValueError(
                f"image_size is {image_size}; expected (height, width) divisible by {unit}."
            )
        backbone = MobileViT(
            features_list=features_list,
            d_list=d_list,
            transformer_depth=transformer_depth,
            expansion=expansion,
            variant=variant,
        )
        upsample = STRIDE // 4
        super().__init__(
            backbone,
            head=partial(
                build_decoder,
                decoder,
                features_list[-1],
                upsample=upsample,
                deconv_channels=deconv_channels,
            ),
            num_keypoints=num_keypoints,
            image_size=image_size,
            heatmap_size=heatmap_size((image_size[0] // STRIDE, image_size[1] // STRIDE), upsample),
            least_side=unit,
        )
        self.record_image_size()


@register(*SIZES)
def _build(name: str, **options: Any) -> MobileViTPose:
    return MobileViTPose(**{**SIZES[name], **options})
