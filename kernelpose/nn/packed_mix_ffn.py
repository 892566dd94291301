"""The three layers of MixFFN as one call, for inference on a CPU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kernelpose import _native
from kernelpose.nn.folding import Folder, bias_of
from kernelpose.nn.inference import core_infers
from kernelpose.nn.panels import panels
from kernelpose.nn.untouched import has_geometry

_MULTIPLE = 16  # what outputs are divided by: whole vectors of any CPU


class PackedMixFFN:
    """fc2(GELU(dwconv(fc1(x)))) of tokens (B, h * w, C), some hidden channels after the other.

    In float32 on a CPU, where neither a gradient nor a graph is wanted and no backend is named. The
    hidden tokens, several times as many numbers as x has, never leave the caches. A copy of the
    weights in the order in which they are read is kept until one changes.
    """

    def __init__(self) -> None:
        self._folder = Folder(_pack)

    def suits(
        self, x: Tensor, fc1: nn.Linear, dwconv: nn.Conv2d, fc2: nn.Linear, size: tuple[int, int]
    ) -> bool:
        """Whether that is so, and the layers fit each other."""
        parameters = (fc1.weight, fc1.bias, dwconv.weight, dwconv.bias, fc2.weight, fc2.bias)
        return (
            core_infers(x, *parameters)
            and x.ndim == 3
            and x.shape[1:] == (size[0] * size[1], fc1.in_features)
            and fc1.weight.shape[0] == fc2.weight.shape[1]
            and dwconv.weight.shape[:2] == (fc1.weight.shape[0], 1)
            and has_geometry(dwconv, 3, padding=1)
            and fc2.out_features % _MULTIPLE == 0
        )

    def __call__(
        self, x: Tensor, fc1: nn.Linear, dwconv: nn.Conv2d, fc2: nn.Linear, size: tuple[int, int]
    ) -> Tensor:
        (weights,) = self._folder([(fc1, dwconv, fc2)])
        x = x.contiguous()
        out = x.new_empty(*x.shape[:2], fc2.out_features)
        if out.numel():
            shape = (x.shape[0], *size, x.shape[2], len(weights[1]), fc2.out_features)
            addresses = [t.data_ptr() for t in weights]
            _native.call("mix_ffn", x, x.data_ptr(), addresses, out.data_ptr(), shape)
        return out


def _pack(fc1: nn.Linear, dwconv: nn.Conv2d, fc2: nn.Linear) -> tuple[Tensor, ...]:
    """What the core takes: hidden channels in whole blocks, the last ones 0; see MixFfnWeights."""
    assert _native.core is not None
    more = -fc1.out_features % _native.core.cpu_mix_ffn_block
    return (
        panels(F.pad(fc1.weight, (0, 0, 0, more))),
        F.pad(bias_of(fc1), (0, more)),
        F.pad(dwconv.weight.flatten(1), (0, 0, 0, more)).contiguous(),
        F.pad(bias_of(dwconv), (0, more)),
        panels(F.pad(fc2.weight, (0, more))),
        bias_of(fc2).contiguous(),
    )
