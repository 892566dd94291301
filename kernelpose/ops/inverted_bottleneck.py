"""Two 1x1 convolutions around a wider map, which never leaves the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelpose import _native
from kernelpose.backend import OpSpec, choose, device_type
from kernelpose.backend import register as register_backends
from kernelpose.ops._register import is_plain, register
from kernelpose.reference.inverted_bottleneck import ACTIVATIONS
from kernelpose.reference.inverted_bottleneck import inverted_bottleneck as reference

_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}  # kernelpose/inverted_bottleneck.h


def inverted_bottleneck(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor | None,
    depthwise_bias: Tensor | None,
    project: Tensor,
    project_bias: Tensor,
    *,
    stride: int = 1,
    residual: bool = False,
    activations: tuple[str, str] = ("none", "silu"),
    backend: str | None = None,
) -> Tensor:
    """[x +] project(act2(depthwise(act1(expand(x))))): the inverted residual of MobileNet v2 (arXiv
    1801.04381), its norms folded, for inference. Of few rows at a time, so that the wide map is
    neither written to memory nor read.

    Args:
        x: (B, C, H, W); anything but dense channels_last memory is copied once.
        expand: (hidden, C, 1, 1). depthwise: (hidden, 1, 3, 3), padded with zeros; None leaves it
            and act2 out. project: (outputs, hidden, 1, 1). Their biases have one number an output.
        stride: of the depthwise convolution, 1 or 2.
        residual: whether x is added, which takes stride 1 and as many outputs as C.
        activations: act1 and act2, of "none", "relu", "silu".
        backend: "cpu" or "eager"; None chooses, see `kernelpose.backend`.

    Returns:
        (B, outputs, H / stride, W / stride) rounded up, of "cpu" in channels_last memory. "cpu" is
        for float32 and has no gradient; without backend, "eager" runs where one is wanted.

    Raises:
        ValueError: a shape, stride or name does not fit. TypeError: no floating-point tensor.
        BackendError: the backend asked for cannot run this.
    """
    tensors = (x, expand, expand_bias, depthwise, depthwise_bias, project, project_bias)
    _check(*tensors, stride, residual, activations)
    chosen = choose("inverted_bottleneck", backend, *tensors)
    if chosen == "eager":
        return reference(*tensors, stride, residual, activations)
    run = _run if is_plain(*tensors) else _op
    first, second = activations
    out: Tensor = run(*tensors, stride, residual, first, second)
    return out


def _check(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor | None,
    depthwise_bias: Tensor | None,
    project: Tensor,
    project_bias: Tensor,
    stride: int,
    residual: bool,
    activations: tuple[str, str],
) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is {given}; expected a floating-point tensor.")
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, C, H, W), only B maybe 0.")
    if (depthwise is None) != (depthwise_bias is None):
        raise ValueError("depthwise_bias is given without depthwise or not at all; expected both.")
    hidden, outputs = expand.shape[0], project.shape[0]
    for name, tensor, shape in (
        ("expand", expand, (hidden, x.shape[1], 1, 1)),
        ("expand_bias", expand_bias, (hidden,)),
        ("depthwise", depthwise, (hidden, 1, 3, 3)),
        ("depthwise_bias", depthwise_bias, (hidden,)),
        ("project", project, (outputs, hidden, 1, 1)),
        ("project_bias", project_bias, (outputs,)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or 0 in shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}.")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; expected a floating-point tensor.")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, as x.")
    if stride not in (1, 2) or (stride == 2 and depthwise is None):
        raise ValueError(f"stride is {stride!r}; expected 1, or 2 with depthwise.")
    if residual and (stride != 1 or outputs != x.shape[1]):
        raise ValueError(
            f"residual is True; expected stride 1 and {x.shape[1]} outputs, as x has channels."
        )
    if len(activations) != 2 or any(name not in ACTIVATIONS for name in activations):
        raise ValueError(
            f"activations is {activations!r}; expected two of {', '.join(ACTIVATIONS)}."
        )


def _run(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor | None,
    depthwise_bias: Tensor | None,
    project: Tensor,
    project_bias: Tensor,
    stride: int,
    residual: bool,
    first: str,
    second: str,
) -> Tensor:
    out = _output(x, expand, expand_bias, depthwise, depthwise_bias, project, project_bias, stride)
    if out.numel() == 0:
        return out
    x = x.permute(0, 2, 3, 1).contiguous()
    weights = [
        None if t is None else t.contiguous()
        for t in (expand, expand_bias, depthwise, depthwise_bias, project, project_bias)
    ]
    _native.call(
        "inverted_bottleneck",
        x,
        x.data_ptr(),
        [_native.address(t) for t in weights],
        out.data_ptr(),
        (*x.shape, expand.shape[0], project.shape[0], stride),
        residual,
        [_CODES[first], _CODES[second]],
    )
    return out


def _output(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor | None,
    depthwise_bias: Tensor | None,
    project: Tensor,
    project_bias: Tensor,
    stride: int,
    *_: Any,
) -> Tensor:
    batch, _channels, height, width = x.shape
    sides = ((side + stride - 1) // stride for side in (height, width))
    return x.new_empty(batch, *sides, project.shape[0]).permute(0, 3, 1, 2)


_op = register(
    "inverted_bottleneck",
    "(Tensor x, Tensor expand, Tensor expand_bias, Tensor? depthwise, Tensor? depthwise_bias, "
    "Tensor project, Tensor project_bias, SymInt stride, bool residual, str first, str second) "
    "-> Tensor",
    _run,
    _output,
    autocast=False,
)


def _objection(backend: str, *tensors: Tensor | None, **_: Any) -> str | None:
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return "it has no gradient"
    if any(tensor.dtype != torch.float32 for tensor in given):
        return "it takes float32 alone"
    if device_type(given[0]) != "meta" and torch.is_autocast_enabled(device_type(given[0])):
        return "it computes float32, and autocast asks for less"
    return None


def _automatic(x: Tensor) -> tuple[str, ...]:
    return ("cpu",) if device_type(x) == "cpu" else ()


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """MobileViT-S at a quarter of the image's size."""
    shapes = ((8, 64, 64, 48), (256, 64, 1, 1), (256,), (256, 1, 3, 3), (256,), (64, 256, 1, 1))
    tensors = (torch.empty(s, device=device, dtype=dtype) for s in (*shapes, (64,)))
    return tuple(tensors), {"residual": True}


register_backends(
    OpSpec(
        name="inverted_bottleneck",
        dtypes={
            "cpu": (torch.float32,),
            "eager": (torch.float32, torch.float16, torch.bfloat16, torch.float64),
        },
        directions="fwd",
        automatic=_automatic,
        objection=_objection,
        example=_example,
    )
)
