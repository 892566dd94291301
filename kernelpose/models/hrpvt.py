"""HRPVT S, M, L: PVT v2 with modules that work at high resolution ("HRPVT", arXiv 2410.22079).

The paper gives neither variants nor their figures. The names are ours: L is the one combination at
40 % of the parameters and 38 % of the products of HRNet-W48, as the abstract has its best model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from kernelpose.models.decoders import SimCCHead, build_decoder, heatmap_size
from kernelpose.models.pose_model import PoseModel
from kernelpose.models.pvtv2 import DROP_PATH, STRIDE, PVTv2
from kernelpose.models.pvtv2 import SIZES as PVT_SIZES
from kernelpose.models.vitpose import is_pair
from kernelpose.models.zoo import register
from kernelpose.nn import HRPMv1

SIZES: dict[str, dict[str, Any]] = {
    "hrpvt-s": {**PVT_SIZES["pvtv2-b0"], "insertion": "stage"},
    "hrpvt-m": {**PVT_SIZES["pvtv2-b1"], "insertion": "stage"},
    "hrpvt-l": {**PVT_SIZES["pvtv2-b2"], "insertion": "layer"},
}

INSERTIONS = ("none", "vanilla", "layer", "stage")

DECODERS = ("simcc", "classic", "simple")


class HRPVT(PoseModel):
    """Images to SimCC logits, or to heatmaps, by a pyramid vision transformer with HRPM inside.

    The backbone has timm's names of PVT v2; beside them stand backbone.stem (HRPM v1, for
    patch_embed) and backbone.stages.i.blocks.j.hrpm (HRPM v2). The head's names are mmpose's. The
    buffer input_size records (height, width), which no shape tells; loading a state_dict leaves it.

    Args:
        embed_dims, depths, num_heads, sr_ratios, mlp_ratios: see `kernelpose.models.PVTv2`.
        insertion: where HRPM v2 stands: "layer", after each layer of the first stage; "stage",
            after the last layer of each stage; "vanilla", after the last layer of the first stage
            alone; or "none". Before the stage's last norm, in each case.
        hrpm_v1: whether HRPM v1 takes the place of the first patch embedding.
        num_keypoints: joints, or {data set: joints} for one decoder each on the one encoder.
        image_size: (height, width), of at least 32. A SimCC head takes images of this size alone;
            with heatmaps others run too.
        decoder: "simcc", or "classic" or "simple" for heatmaps of a quarter of the image, see
            `kernelpose.models.decoders`.
        deconv_channels: of the classic decoder, 256 three times by default.
        split_ratio: bins of the SimCC head per pixel.
        drop_path: stochastic depth of the last layer, linear from 0; it acts in training alone.

    Raises ValueError, with the argument's name, for a value out of its range.
    """

    def __init__(
        self,
        *,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int] = (1, 2, 5, 8),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        insertion: str = "layer",
        hrpm_v1: bool = True,
        num_keypoints: int | Mapping[str, int] = 17,
        image_size: tuple[int, int] = (256, 192),
        decoder: str = "simcc",
        deconv_channels: Sequence[int] | None = None,
        split_ratio: float = 2.0,
        drop_path: float = 0.0,
    ) -> None:
        if insertion not in INSERTIONS:
            raise ValueError(
                f"insertion is {insertion!r}; expected one of {', '.join(INSERTIONS)}."
            )
        if decoder not in DECODERS:
            raise ValueError(f"decoder is {decoder!r}; expected one of {', '.join(DECODERS)}.")
        if not is_pair(image_size, STRIDE):
            raise ValueError(
                f"image_size is {image_size}; expected (height, width) of at least {STRIDE}."
            )
        if decoder != "classic" and deconv_channels is not None:
            raise ValueError(
                f"deconv_channels is {tuple(deconv_channels)}; expected None with "
                f"decoder={decoder!r}."
            )
        backbone = PVTv2(
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            sr_ratios=sr_ratios,
            mlp_ratios=mlp_ratios,
            drop_path=drop_path,
            stem=HRPMv1(embed_dims[0]) if hrpm_v1 else None,
            hrpm=blocks_with_hrpm(insertion, depths),
        )
        width = embed_dims[-1]
        grid = (-(-image_size[0] // STRIDE), -(-image_size[1] // STRIDE))
        upsample = STRIDE // 4
        simcc = decoder == "simcc"
        super().__init__(
            backbone,
            head=partial(
                SimCCHead, width, grid=grid, image_size=image_size, split_ratio=split_ratio
            )
            if simcc
            else partial(
                build_decoder, decoder, width, upsample=upsample, deconv_channels=deconv_channels
            ),
            num_keypoints=num_keypoints,
            image_size=image_size,
            heatmap_size=None if simcc else heatmap_size(grid, upsample),
            least_side=STRIDE,
        )
        self.record_image_size()


def blocks_with_hrpm(insertion: str, depths: Sequence[int]) -> list[Collection[int]]:
    """For each stage, after which of its blocks HRPM v2 stands."""
    if insertion == "stage":
        return [(depth - 1,) for depth in depths]
    first = {"none": (), "vanilla": (depths[0] - 1,), "layer": tuple(range(depths[0]))}
    return [first[insertion], (), (), ()]


@register(*SIZES)
def _build(name: str, **options: Any) -> HRPVT:
    return HRPVT(**{**SIZES[name], "drop_path": DROP_PATH, **options})
