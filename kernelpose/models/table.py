"""What each model of the zoo costs, and what its authors published of it.

A row a model; `kernelpose models` prints the rows, and the README's table is made of them. Figures
of cost are counted (`kernelpose.models.counting`), and a test counts them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelInfo:
    """A model as `create_model(info.name)` builds it.

    Attributes:
        name: what `create_model` takes.
        image_size: (height, width) of the input.
        decoders: what its `decoder` may be, first the default, with which the costs are counted.
        parameters: their number.
        gmacs: billions of multiply-accumulates of one image.
        convention: how gmacs are counted, see `kernelpose.models.counting.Count`; "all" counts the
            products of convolutions, linears and attention.
        accuracy: as published, by what was measured; None where nothing was.
        source: where it was published; None where nothing was.
        standing: how the model relates to what was published, its published costs included.
        weights: what comes with the package.
    """

    name: str
    image_size: tuple[int, int]
    decoders: tuple[str, ...]
    parameters: int
    gmacs: float
    convention: str = field(default="all", kw_only=True)
    accuracy: Mapping[str, float] | None = field(default=None, kw_only=True, hash=False)
    source: str | None = field(default=None, kw_only=True)
    standing: str = field(kw_only=True)
    weights: str = field(default="none shipped", kw_only=True)


_COCO = (256, 192)
_CLASSIC = ("classic", "simple")
_SIMPLE = ("simple", "classic")
_SIMCC = ("simcc", "classic", "simple")

_VITPOSE = "arXiv 2204.12484 and ViTAE-Transformer/ViTPose"
_MITPOSE = "README of WillWu111/Variants_of_ViT"
_HEVITPOSE = "arXiv 2311.13615 and README of T1sweet/HEViTPose"
_MOBILEVITPOSE = "README of jody1188/MobileViTPose"

_FIGURE = "after the authors' figure, which contradicts their code and table; published"
_RELEASED = (
    "the released backbone, which contradicts figure and table: SCConv in every block, dense local "
    "convolutions once, no GRN; published"
)
_RECONSTRUCTED = (
    "widths, depths and groups are our reconstruction, by search on the six published costs; its "
    "own are, `hooked` at 256×256,"
)
_MOBILE = (
    "the released backbone with three deconvolutions, as its first configuration has it; "
    "published, `hooked` at 256×256,"
)
_OURS = "the paper's variants are not public: name, and where HRPM v2 stands, are our choice"

MODELS = (
    ModelInfo(
        "vitpose-s", _COCO, _CLASSIC, 24_290_577, 5.594,
        accuracy={"COCO val AP": 73.8, "COCO val AP, simple decoder": 73.5},
        source=_VITPOSE,
        standing="as released",
    ),
    ModelInfo(
        "vitpose-b", _COCO, _CLASSIC, 89_994_513, 18.523,
        accuracy={"COCO val AP": 75.8, "COCO val AP, simple decoder": 75.5},
        source=_VITPOSE,
        standing="as released; published 86 M, 17.1 G of the encoder, ours 85.8 M, 17.1 G",
    ),
    ModelInfo(
        "vitpose-l", _COCO, _CLASSIC, 308_544_785, 61.569,
        accuracy={"COCO val AP": 78.3, "COCO val AP, simple decoder": 78.2},
        source=_VITPOSE,
        standing="as released; published 307 M of the encoder, ours 303.3, and 59.8 G, `layers`, "
        "ours 59.8",
    ),
    ModelInfo(
        "vitpose-h", _COCO, _CLASSIC, 637_208_849, 125.830,
        accuracy={"COCO val AP": 79.1, "COCO val AP, simple decoder": 78.9},
        source=_VITPOSE,
        standing="as released; published 632 M of the encoder, ours 630.9, and 122.8 G, `layers`, "
        "ours 122.8",
    ),
    ModelInfo(
        "mitpose-b", _COCO, _SIMPLE, 90_000_041, 18.070,
        accuracy={"COCO val AP": 76.5, "COCO test-dev AP": 77.1},
        source=_MITPOSE,
        standing=f"{_FIGURE} 90.1 M, 77.1 G; the G cannot be reproduced",
    ),
    ModelInfo(
        "mitpose-l", _COCO, _SIMPLE, 315_363_649, 62.096,
        accuracy={"COCO val AP": 78.8, "COCO test-dev AP": 79.2},
        source=_MITPOSE,
        standing=f"{_FIGURE} 401.0 M, 78.1 G; no rule that meets B's meets these",
    ),
    ModelInfo(
        "mitpose-h", _COCO, _SIMPLE, 654_034_513, 127.730,
        accuracy={"COCO val AP": 79.8, "COCO test-dev AP": 80.4},
        source=_MITPOSE,
        standing=f"{_FIGURE} 604.3 M, 79.3 G, less than a bare ViT-H",
    ),
    ModelInfo(
        "mitpose-b-released", _COCO, _SIMPLE, 151_340_659, 30.003,
        accuracy={"COCO val AP": 76.5, "COCO test-dev AP": 77.1},
        source=_MITPOSE,
        standing=f"{_RELEASED} 90.1 M, 77.1 G",
    ),
    ModelInfo(
        "mitpose-l-released", _COCO, _SIMPLE, 442_599_539, 87.102,
        accuracy={"COCO val AP": 78.8, "COCO test-dev AP": 79.2},
        source=_MITPOSE,
        standing=f"{_RELEASED} 401.0 M, 78.1 G",
    ),
    ModelInfo(
        "mitpose-h-released", _COCO, _SIMPLE, 872_286_835, 170.849,
        accuracy={"COCO val AP": 79.8, "COCO test-dev AP": 80.4},
        source=_MITPOSE,
        standing=f"{_RELEASED} 604.3 M, 79.3 G",
    ),
    ModelInfo(
        "hevitpose-t", _COCO, _CLASSIC, 3_215_249, 1.368,
        accuracy={"MPII test": 88.7, "MPII val": 87.2},
        source=_HEVITPOSE,
        standing=f"{_RECONSTRUCTED} 3.21 M, 1.75 G, ours 3.22 M, 1.76 G",
    ),
    ModelInfo(
        "hevitpose-s", _COCO, _CLASSIC, 5_851_153, 2.799,
        accuracy={"MPII test": 90.1, "MPII val": 88.5},
        source=_HEVITPOSE,
        standing=f"{_RECONSTRUCTED} 5.88 M, 3.64 G, ours 5.85 M, 3.63 G",
    ),
    ModelInfo(
        "hevitpose-b", _COCO, _CLASSIC, 10_599_505, 4.319,
        accuracy={
            "COCO val AP": 75.4, "COCO test-dev AP": 72.6, "MPII test": 90.7, "MPII val": 89.4,
        },
        source=_HEVITPOSE,
        standing=f"{_RECONSTRUCTED} 10.63 M, 5.58 G, ours 10.60 M, 5.64 G",
    ),
    ModelInfo(
        "mobilevitpose-xxs", _COCO, _CLASSIC, 4_423_793, 1.348,
        accuracy={"COCO val AP": 61.7, "COCO val AP, no pretraining": 60.2},
        source=_MOBILEVITPOSE,
        standing=f"{_MOBILE} 4 M, 2 G, ours 4.4 M, 1.8 G",
    ),
    ModelInfo(
        "mobilevitpose-s", _COCO, _CLASSIC, 9_718_017, 2.458,
        accuracy={"COCO val AP": 69.4, "COCO val AP, no pretraining": 63.9},
        source=_MOBILEVITPOSE,
        standing=f"{_MOBILE} 9.72 M, 3.28 G, ours 9.72 M, 3.28 G",
    ),
    ModelInfo("hrpvt-s", _COCO, _SIMCC, 5_349_121, 1.339, standing=_OURS),
    ModelInfo("hrpvt-m", _COCO, _SIMCC, 21_024_513, 4.620, standing=_OURS),
    ModelInfo(
        "hrpvt-l", _COCO, _SIMCC, 25_198_209, 5.721,
        standing=f"{_OURS}; published for the best model, its input untold: 76.3 COCO val AP, 75.5 "
        "test-dev AP, 40 % of HRNet-W48's parameters and 38 % of its GMACs: 25.4 M, 5.55 G, ours "
        "25.2 M, 5.58 G, `layers`",
    ),
)  # fmt: skip
