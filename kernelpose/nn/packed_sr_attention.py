"""All layers of SRAttention as one call, for inference on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernelpose import _native
from kernelpose.nn.folding import Folder, bias_of
from kernelpose.nn.inference import core_infers
from kernelpose.nn.panels import panels
from kernelpose.nn.untouched import has_geometry

_MULTIPLE = 16  # what channels of a head are divided by: whole vectors of any CPU
_MAX_HEAD_DIM = 128


class PackedSRAttention:
    """The attention of tokens (B, h * w, C) to their reduced map, projections included.

    In float32 on a CPU, where neither a gradient nor a graph is wanted and no backend is named. The
    numbers of a block of tokens stay in the cache from the queries' projection to the last. A copy
    of the weights in the order in which they are read is kept until one changes.
    """

    def __init__(self) -> None:
        self._folder = Folder(_pack)

    def suits(
        self,
        x: Tensor,
        layers: tuple[nn.Linear, nn.Linear, nn.Linear],
        reduction: tuple[nn.Conv2d, nn.LayerNorm] | None,
        num_heads: int,
        size: tuple[int, int],
    ) -> bool:
        """Whether that is so, and the layers fit each other. layers: q, kv, proj; reduction: a
        convolution whose stride is its kernel, and its norm."""
        parameters = [p for layer in (*layers, *(reduction or ())) for p in layer.parameters()]
        channels = layers[0].in_features
        shapes = [(channels, channels), (2 * channels, channels), (channels, channels)]
        return (
            core_infers(x, *parameters)
            and x.ndim == 3
            and x.shape[1:] == (size[0] * size[1], channels)
            and x.shape[1] > 0
            and [layer.weight.shape for layer in layers] == shapes
            and channels // num_heads % _MULTIPLE == 0
            and channels // num_heads <= _MAX_HEAD_DIM
            and (reduction is None or _reduces(*reduction, channels, size))
        )

    def __call__(
        self,
        x: Tensor,
        layers: tuple[nn.Linear, nn.Linear, nn.Linear],
        reduction: tuple[nn.Conv2d, nn.LayerNorm] | None,
        num_heads: int,
        size: tuple[int, int],
    ) -> Tensor:
        (weights,) = self._folder([(*layers, *(reduction or ()))])
        x = x.contiguous()
        out = torch.empty_like(x)
        if out.numel():
            ratio, eps = (
                (1, 0.0) if reduction is None else (reduction[0].stride[0], reduction[1].eps)
            )
            addresses = [t.data_ptr() for t in weights]
            addresses += [0] * (10 - len(addresses))
            shape = (x.shape[0], *size, x.shape[2], num_heads, ratio, eps)
            _native.call("sr_attention", x, x.data_ptr(), addresses, out.data_ptr(), shape)
        return out


def _reduces(conv: nn.Conv2d, norm: nn.LayerNorm, channels: int, size: tuple[int, int]) -> bool:
    ratio = conv.kernel_size[0]
    return (
        conv.weight.shape[:2] == (channels, channels)
        and has_geometry(conv, ratio, stride=ratio)
        and norm.normalized_shape == (channels,)
        and min(size) >= ratio
    )


def _pack(*layers: nn.Module) -> tuple[Tensor, ...]:
    """What the core takes, see SrAttentionWeights."""
    packed = []
    for layer in layers:
        assert isinstance(layer, (nn.Linear, nn.Conv2d, nn.LayerNorm))
        weight = layer.weight
        if isinstance(layer, nn.Conv2d):
            weight = weight.permute(0, 2, 3, 1).flatten(1)
        packed.append(weight.contiguous() if weight.ndim == 1 else panels(weight))
        packed.append(bias_of(layer).contiguous())
    return tuple(packed)
