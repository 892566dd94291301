"""Whether a kernel may read the parameters of layers instead of calling them."""

from __future__ import annotations

from torch import nn

from kernelpose.nn.add_layer_norm import AddLayerNorm

_STOCK = frozenset(
    (
        AddLayerNorm,
        nn.BatchNorm2d,
        nn.Conv2d,
        nn.ConvTranspose2d,
        nn.GroupNorm,
        nn.LayerNorm,
        nn.Linear,
        nn.SyncBatchNorm,
    )
)


def untouched(*layers: nn.Module) -> bool:
    """Whether calling these layers does no more than their classes do with their own parameters.

    Not so where another class stands in the place of a layer (adapters, quantised layers,
    parametrizations), where a hook is registered (pruning, weight norm, whoever looks at what a
    layer gives), or where `forward` was replaced (offloading).
    """
    for layer in layers:  # loops: these are asked in every call, and generators take twice as long
        if type(layer) not in _STOCK or "weight" not in layer._parameters:
            return False
    return unhooked(*layers)


def unhooked(*modules: nn.Module) -> bool:
    """Whether calling these modules calls nothing but the forward of their classes."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return False
    return True
