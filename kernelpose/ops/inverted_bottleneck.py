"""Two 1x1 convolutions around a wider map, which never leaves the chip."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelpose import _native
from kernelpose.backend import OpSpec, choose
from kernelpose.backend import register as register_backends
from kernelpose.ops._register import autocast, is_plain, no_autocast, register
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
    1801.04381), its norms folded, for inference. Of a few rows, or a tile, at a time, so that the
    wide map is neither written to memory nor read.

    Args:
        x: (B, C, H, W), float32, or on a GPU float16 or bfloat16 too; anything but dense
            channels_last memory is copied once.
        expand: (hidden, C, 1, 1). depthwise: (hidden, 1, 3, 3), padded with zeros; None leaves it
            and act2 out. project: (outputs, hidden, 1, 1). Their biases have one number an output.
            All in x's dtype.
        stride: of the depthwise convolution, 1 or 2.
        residual: whether x is added, which takes stride 1 and as many outputs as C.
        activations: act1 and act2, of "none", "relu", "silu".
        backend: "cuda", "triton", "cpu" or "eager"; None chooses, see `kernelpose.backend`. Only
            the last has a gradient: where one is wanted, None chooses "eager".

    Returns:
        (B, outputs, H / stride, W / stride) rounded up, in x's dtype, of all but "eager" in
        channels_last memory. Sums are float32. Under autocast all tensors are cast to its dtype.

    Raises:
        ValueError: a shape, stride or name does not fit. TypeError: no floating-point tensor, or
        two dtypes. BackendError: the backend asked for cannot run this.
    """
    tensors = {
        "x": x,
        "expand": expand,
        "expand_bias": expand_bias,
        "depthwise": depthwise,
        "depthwise_bias": depthwise_bias,
        "project": project,
        "project_bias": project_bias,
    }
    _check(tensors, stride, residual, activations)
    inputs: list[Any] = [None if t is None else autocast(t) for t in tensors.values()]
    main: Tensor = inputs[0]
    for name, tensor in zip(tensors, inputs, strict=True):
        if tensor is not None and tensor.dtype != main.dtype:
            raise TypeError(f"{name} is {tensor.dtype}; expected {main.dtype}, as x.")
    chosen = choose("inverted_bottleneck", backend, *inputs)
    if chosen == "eager":
        arguments: list[Any] = [*inputs, stride, residual, activations]
        with no_autocast(main):
            return reference(*arguments)
    run = _run if is_plain(*inputs) else _op
    out: Tensor = run(*inputs, stride, residual, *activations, chosen)
    return out


def _check(
    tensors: dict[str, Tensor | None], stride: int, residual: bool, activations: tuple[str, str]
) -> None:
    optional = ("depthwise", "depthwise_bias")
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; expected a tensor.")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; expected a floating-point tensor.")
    x, expand, _, depthwise, _, project, _ = tensors.values()
    assert x is not None and expand is not None and project is not None
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, C, H, W), only B maybe 0.")
    if (depthwise is None) != (tensors["depthwise_bias"] is None):
        raise ValueError("depthwise_bias is given without depthwise or not at all; expected both.")
    channels, hidden, outputs = x.shape[1], expand.shape[0], project.shape[0]
    shapes = {
        "expand": (hidden, channels, 1, 1),
        "expand_bias": (hidden,),
        "depthwise": (hidden, 1, 3, 3),
        "depthwise_bias": (hidden,),
        "project": (outputs, hidden, 1, 1),
        "project_bias": (outputs,),
    }
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor is None:
            continue
        if tensor.shape != shape or 0 in shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}.")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, as x.")
    if stride not in (1, 2) or (stride == 2 and depthwise is None):
        raise ValueError(f"stride is {stride!r}; expected 1, or 2 with depthwise.")
    if residual and (stride != 1 or outputs != channels):
        raise ValueError(
            f"residual is True; expected stride 1 and {channels} outputs, as x has channels."
        )
    if len(activations) != 2 or any(name not in ACTIVATIONS for name in activations):
        raise ValueError(
            f"activations is {activations!r}; expected two of {', '.join(ACTIVATIONS)}."
        )


def _run(x: Tensor, *rest: Any) -> Tensor:
    *weights, stride, residual, first, second, backend = rest
    out = _output(x, *rest)
    if out.numel() == 0:
        return out
    x = x.permute(0, 2, 3, 1).contiguous()
    weights = [None if t is None else t.contiguous() for t in weights]
    if backend == "triton":
        from kernelpose.triton_kernels import inverted_bottleneck as kernels

        kernels.forward(x, weights, out.permute(0, 2, 3, 1), stride, residual, (first, second))
        return out
    _native.call(
        "inverted_bottleneck",
        x,
        x.data_ptr(),
        [_native.address(t) for t in weights],
        out.data_ptr(),
        (*x.shape, weights[0].shape[0], out.shape[1], stride),
        residual,
        [_CODES[first], _CODES[second]],
        *([] if x.is_cpu else [_native.DTYPE_CODES[x.dtype]]),
    )
    return out


def _output(x: Tensor, *rest: Any) -> Tensor:
    project, stride = rest[4], rest[6]
    sides = ((side + stride - 1) // stride for side in x.shape[2:])
    return x.new_empty(x.shape[0], *sides, project.shape[0]).permute(0, 3, 1, 2)


_op = register(
    "inverted_bottleneck",
    "(Tensor x, Tensor expand, Tensor expand_bias, Tensor? depthwise, Tensor? depthwise_bias, "
    "Tensor project, Tensor project_bias, int stride, bool residual, str first, str second, "
    "str backend) -> Tensor",
    _run,
    _output,
    autocast=7,
)


def _objection(backend: str, *inputs: Tensor | None, **_: Any) -> str | None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return "it has no gradient, and an input requires one"
    if backend == "cpu" or torch.compiler.is_exporting():  # or sizes would get an upper bound
        return None
    x, expand, *_rest, project, _bias = inputs
    assert x is not None and expand is not None and project is not None
    outputs, pixels = project.shape[0], x.shape[2] * x.shape[3]
    limits = [  # a grid's blocks, and numbers of 32 bits
        ("pixels of an image", pixels, 2**30),
        ("elements of an image", pixels * max(x.shape[1], outputs), 2**31),
        ("elements of a weight", expand.shape[0] * max(x.shape[1], outputs), 2**31),
        ("pixels of all images for 128 outputs", x.shape[0] * pixels * (outputs // 128 + 1), 2**31),
    ]
    for what, count, limit in limits:
        if count >= limit:
            return f"it takes fewer than {limit} {what}, and this has {count}"
    return None


def _automatic(x: Tensor) -> tuple[str, ...]:
    """On a GPU nothing was measured yet; CUDA C++ stands first."""
    return {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}.get(x.device.type, ())


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """MobileViT-S at a quarter of the image's size."""
    shapes = ((8, 64, 64, 48), (256, 64, 1, 1), (256,), (256, 1, 3, 3), (256,), (64, 256, 1, 1))
    tensors = (torch.empty(s, device=device, dtype=dtype) for s in (*shapes, (64,)))
    return tuple(tensors), {"residual": True}


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

register_backends(
    OpSpec(
        name="inverted_bottleneck",
        dtypes={
            "cuda": _FLOATS,
            "triton": _FLOATS,
            "cpu": (torch.float32,),
            "eager": (*_FLOATS, torch.float64),
        },
        directions="fwd",
        automatic=_automatic,
        objection=_objection,
        example=_example,
    )
)
