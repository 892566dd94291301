"""Norms folded into the layers beside them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kernelpose.ops._register import is_plain, no_autocast

Convolution = nn.Conv2d | nn.ConvTranspose2d


def can_fold(norms: Sequence[_BatchNorm]) -> bool:
    """Whether norms use the statistics they keep, as in eval mode, rather than those of a batch."""
    # Asked in every call: a generator, and norm.running_var, would take longer.
    return not [n for n in norms if n.training or n._buffers["running_var"] is None]


def fold(conv: Convolution, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution that equals conv and then norm with its statistics.

    Computed in float32 at least, given in the dtype of conv's weight, and differentiable.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    factor = (norm.running_var.to(dtype) + norm.eps).rsqrt() * norm.weight.to(dtype)
    shift = -norm.running_mean.to(dtype)
    if conv.bias is not None:
        shift = shift + conv.bias.to(dtype)
    bias = shift * factor + norm.bias.to(dtype)
    out_first = (1, -1) if isinstance(conv, nn.ConvTranspose2d) else (-1, 1)
    weight = conv.weight.to(dtype) * factor.view(*out_first, 1, 1)
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def fold_affine(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of one linear that equals norm's weight and bias, and then linear.

    What is left of norm has neither. Precision and dtype as `fold`'s.
    """
    dtype = torch.promote_types(linear.weight.dtype, torch.float32)
    weight = linear.weight.to(dtype)
    bias = bias_of(linear).to(dtype) + (weight * bias_of(norm).to(dtype)).sum(1)
    weight = weight * norm.weight.to(dtype)
    return weight.to(linear.weight.dtype), bias.to(linear.weight.dtype)


def bias_of(layer: nn.Conv2d | nn.LayerNorm | nn.Linear) -> Tensor:
    """The bias of a layer, zeros where it has none."""
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias


class Folder:
    """A folding of several groups of layers, which keeps what it made until a tensor changes.

    What it keeps is made anew where a gradient is wanted or something traces. A change in place
    through `.data` goes unseen. A copy or a file holds nothing.

    Args:
        function: the layers of a group -> weight and bias, or more; `fold` by default.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]] = fold) -> None:
        self._function = function
        self._made: list[tuple[Tensor, ...]] = []
        self._made_of: list[int] = []  # see `_state`
        self._tensors: list[Tensor] = []
        self._held: list[Tensor] = []  # lest another tensor come to lie there

    def __call__(self, groups: Sequence[Sequence[nn.Module]]) -> list[tuple[Tensor, ...]]:
        tensors = [
            tensor
            for layers in groups
            for layer in layers
            for tensor in (*layer._parameters.values(), *layer._buffers.values())
            if tensor is not None
        ]
        # Those that it was made of were plain.
        known = not torch.is_grad_enabled() and len(tensors) == len(self._tensors)
        known = known and all(map(operator.is_, tensors, self._tensors))
        if not is_plain(*(() if known else tensors)):
            return [self._function(*layers) for layers in groups]
        made_of = _state(tensors)
        if self._made_of != made_of:
            with torch.inference_mode(False), torch.no_grad(), no_autocast(tensors[0]):
                self._made = [self._function(*layers) for layers in groups]
                self._held = [tensor.detach() for tensor in tensors]
            self._tensors, self._made_of = tensors, made_of
        return self._made

    def __reduce__(self) -> tuple[type[Folder], tuple[Any]]:
        return Folder, (self._function,)


def _state(tensors: Sequence[Tensor]) -> list[int]:
    """Where tensors lie, and their versions."""
    places = [tensor.data_ptr() for tensor in tensors]
    try:
        versions = [tensor._version for tensor in tensors]
    except RuntimeError:  # those made in inference mode have none
        versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    return places + versions
