"""Whether a kernel may read the parameters of layers instead of calling them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

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
    layer gives), where `forward` was replaced (offloading), where a layer has no weight, or pads
    with other numbers than zeros.
    """
    for layer in layers:  # loops: these are asked in every call, and generators take twice as long
        if type(layer) not in _STOCK or layer._parameters.get("weight") is None:
            return False
        if layer.__dict__.get("padding_mode", "zeros") != "zeros":
            return False
    return unhooked(*layers)


def has_geometry(
    conv: nn.Module, kernel: int, *, stride: int = 1, padding: int = 0, dilation: int = 1
) -> bool:
    """Whether a convolution, transposed or not, is so in both directions, whatever its channels.

    Users put others in the place of those that a module was built with, or change their attributes.
    """
    assert isinstance(conv, _ConvNd)
    weight = conv._parameters["weight"]  # conv.weight takes longer
    return (
        weight is not None
        and weight.shape[2:] == (kernel, kernel)
        and conv.stride == (stride, stride)
        and conv.padding == (padding, padding)
        and conv.dilation == (dilation, dilation)
        and conv.output_padding == (0, 0)
    )


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
