"""MobileViT's backbone, as the released MobileViTPose code has it and as timm has it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kernelpose import ops
from kernelpose.models.pvtv2 import init_weights
from kernelpose.nn import ConvNorm, MobileViTBlock
from kernelpose.nn.folding import Folder, can_fold
from kernelpose.nn.mobilevit_block import NORM_NAMES, PATCH
from kernelpose.nn.untouched import has_geometry, unhooked, untouched

STRIDE = 32  # of the last map
_AROUND_LAYERS = frozenset((ConvNorm, nn.Sequential, nn.SiLU))  # of an inverted residual


class InvertedResidual(nn.Module):
    """MobileNet v2's block, maps (B, C, H, W) -> (B, out_channels, H / stride, W / stride).

    A 1x1 convolution, wider by `expansion`, a depthwise 3x3 one, and a 1x1 one, each with a
    BatchNorm; SiLU after the second, in variant "apple" after the first too; added to its input
    where the shapes allow it. In eval mode all of it is `kernelpose.ops.inverted_bottleneck`. Names
    are those of the variant's code.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, expansion: int, variant: str
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.variant = variant
        convolution, act = partial(ConvNorm, norm_name=NORM_NAMES[variant]), nn.SiLU()
        if variant == "released":
            self.conv = nn.Sequential(
                convolution(in_channels, hidden),
                convolution(hidden, hidden, 3, stride=stride, groups=hidden, act=act),
                nn.Conv2d(hidden, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        else:
            self.conv1_1x1 = convolution(in_channels, hidden, act=act)
            self.conv2_kxk = convolution(hidden, hidden, 3, stride=stride, groups=hidden, act=act)
            self.conv3_1x1 = convolution(hidden, out_channels)
        self._folder = Folder()

    def forward(self, x: Tensor) -> Tensor:
        if self._is_one_op():
            pairs = self.pairs()
            return ops.inverted_bottleneck(
                x,
                *(tensor for folded in self._folder(pairs) for tensor in folded),
                stride=pairs[1][0].stride[0],
                residual=self.residual,
                activations=("none" if self.variant == "released" else "silu", "silu"),
            )
        if self.variant == "released":
            y: Tensor = self.conv(x)
        else:
            y = self.conv3_1x1(self.conv2_kxk(self.conv1_1x1(x)))
        return x + y if self.residual else y

    def pairs(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """The convolutions and their norms."""
        if self.variant == "apple":
            return [self.conv1_1x1.pair, self.conv2_kxk.pair, self.conv3_1x1.pair]
        expand, depthwise, conv, norm = cast("Any", self.conv)
        return [expand.pair, depthwise.pair, (conv, norm)]

    def _is_one_op(self) -> bool:
        modules = list(self.modules())[1:]
        if not all(
            unhooked(module) if type(module) in _AROUND_LAYERS else untouched(module)
            for module in modules
        ):
            return False
        (expand, _), (depthwise, _), (project, _) = self.pairs()
        return (
            can_fold([module for module in modules if isinstance(module, _BatchNorm)])
            and has_geometry(depthwise, 3, stride=depthwise.stride[0], padding=1)
            and has_geometry(expand, 1)
            and has_geometry(project, 1)
        )


class MobileViT(nn.Module):
    """Images (B, 3, H, W) -> features (B, C, H / 32, W / 32), H and W divisible by 32.

    Variant "released" has the released code's names, less its unused classifier, which is dropped
    on loading; variant "apple" has timm's, less its classifier, and takes sides divisible by 64,
    since timm resamples the odd maps of others. Maps are in channels_last memory.

    Args:
        features_list: widths of the stem, of its block or of the first stage, and so on in twos to
            the last map: eleven.
        d_list, transformer_depth: token width and layers of the transformer of stages 2, 3 and 4.
        expansion: hidden width over input width of the inverted residuals.
        variant: see `kernelpose.nn.MobileViTBlock`.

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
    ) -> None:
        super().__init__()
        for name, values, length in (
            ("features_list", features_list, 11),
            ("d_list", d_list, 3),
            ("transformer_depth", transformer_depth, 3),
        ):
            if not isinstance(values, Sequence) or len(values) != length or min(values) < 1:
                raise ValueError(f"{name} is {values!r}; expected {length} positive integers.")
        if not isinstance(expansion, int) or expansion < 1:
            raise ValueError(f"expansion is {expansion!r}; expected a positive integer.")
        self.divisor = divisor(variant)
        c = features_list

        def residual(i: int, o: int, stride: int) -> nn.Module:
            return InvertedResidual(c[i], c[o], stride, expansion, variant)

        def stage(number: int) -> list[nn.Module]:
            i, width = 2 * number, d_list[number - 2]
            # timm's feed-forward networks are of twice the token width in every stage.
            wider = 2 if number == 2 or variant == "apple" else 4
            layers = transformer_depth[number - 2]
            return [
                residual(i - 1, i, 2),
                MobileViTBlock(c[i], c[i + 1], width, layers, wider * width, variant=variant),
            ]

        first = [residual(1, 2, 2), residual(2, 2, 1), residual(2, 3, 1)]
        # The children run in this order.
        if variant == "released":
            self.stem: nn.Module = nn.Sequential(
                nn.Conv2d(3, c[0], 3, stride=2, padding=1), residual(0, 1, 1)
            )
            self.stage1 = nn.Sequential(*first)
            self.stage2 = nn.Sequential(*stage(2))
            self.stage3 = nn.Sequential(*stage(3))
            self.stage4 = nn.Sequential(*stage(4), nn.Conv2d(c[9], c[10], 1))
        else:
            convolution = partial(ConvNorm, act=nn.SiLU(), norm_name=NORM_NAMES[variant])
            self.stem = convolution(3, c[0], 3, stride=2)
            stages = ([residual(0, 1, 1)], first, *(stage(number) for number in (2, 3, 4)))
            self.stages = nn.Sequential(*(nn.Sequential(*blocks) for blocks in stages))
            self.final_conv = convolution(c[9], c[10])
        self.apply(init_weights)
        self.register_load_state_dict_pre_hook(_drop_classifier)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2] % self.divisor or images.shape[3] % self.divisor:
            raise ValueError(
                f"images has shape {tuple(images.shape)}; expected (B, 3, H, W), H and W divisible "
                f"by {self.divisor}."
            )
        x = images.contiguous(memory_format=torch.channels_last)
        for part in self.children():
            x = part(x)
        return x


def divisor(variant: str) -> int:
    """What the sides of an image are divisible by."""
    return STRIDE if variant == "released" else STRIDE * PATCH[0]


def _drop_classifier(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in ("fc.weight", "fc.bias", "head.fc.weight", "head.fc.bias"):
        state.pop(prefix + name, None)
