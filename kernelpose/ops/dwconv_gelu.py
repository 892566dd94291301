"""Depthwise 3x3 convolution and exact GELU of tokens, as they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelpose import _native
from kernelpose.backend import OpSpec, choose
from kernelpose.backend import register as register_backends
from kernelpose.ops._maps import statistics_dtype
from kernelpose.ops._register import autocast, is_plain, no_second_derivative, register
from kernelpose.reference.dwconv_gelu import dwconv_gelu as reference


def dwconv_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    size: tuple[int, int],
    backend: str | None = None,
) -> Tensor:
    """GELU(bias + the depthwise 3x3 convolution of the map that the tokens make), zeros around it:
    the middle of PVT v2's feed-forward network (arXiv 2106.13797). GELU is the exact one, by erf.

    Args:
        x: (B, N, C) tokens of maps, row by row; anything but dense tokens is copied once. float32,
            float16, bfloat16 (or float64 on a CPU).
        weight: (C, 1, 3, 3). bias: (C,). Both of any floating-point dtype.
        size: (height, width) of the map, whose product is N.
        backend: "cuda", "triton", "cpu" or "eager"; None chooses, see `kernelpose.backend`.

    Returns:
        (B, N, C), dense but for "eager"; kernels compute in float32 (float64 for float64). Under
        autocast x is cast to autocast's dtype. The backward pass computes the convolution again,
        rather than keep it, and is deterministic; a second derivative needs "eager".

    Raises:
        ValueError: a shape or size does not fit. TypeError: no floating-point tensor, or no size.
        BackendError: the backend asked for cannot run this.
    """
    height, width = _check(x, weight, bias, size)
    x = autocast(x)
    chosen = choose("dwconv_gelu", backend, x, weight, bias, size=size)
    if chosen == "eager":
        return reference(x, weight, bias, (height, width))
    dtype = statistics_dtype(x)
    if weight.dtype != dtype or bias.dtype != dtype:
        weight, bias = weight.to(dtype), bias.to(dtype)
    run = _run_forward if is_plain(x, weight, bias) else _op
    out: Tensor = run(x, weight, bias, height, width, chosen)
    return out


def _check(x: Tensor, weight: Tensor, bias: Tensor, size: Any) -> tuple[int, int]:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; expected a tensor.")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; expected a floating-point tensor.")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, as x.")
    if x.ndim != 3 or x.shape[2] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, N, C), C not 0.")
    if (
        not isinstance(size, tuple | list | torch.Size)
        or len(size) != 2
        or not all(isinstance(n, int | torch.SymInt) and n > 0 for n in size)
    ):
        raise TypeError(f"size is {size!r}; expected (height, width), two positive integers.")
    height, width = size
    if height * width != x.shape[1]:
        raise ValueError(f"size is {height, width}; expected the {x.shape[1]} tokens of x.")
    channels = x.shape[2]
    for name, tensor, shape in (
        ("weight", weight, (channels, 1, 3, 3)),
        ("bias", bias, (channels,)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}.")
    return height, width


def _run_forward(
    x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, backend: str
) -> Tensor:
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    out = _like(x)
    if x.numel() == 0:
        return out
    if backend == "triton":
        from kernelpose.triton_kernels import dwconv_gelu as kernels

        kernels.forward(x, weight, bias, out, (height, width))
        return out
    shape, code = (x.shape[0], height, width, x.shape[2]), _native.DTYPE_CODES[x.dtype]
    addresses = [_native.address(t) for t in (x, weight, bias, out)]
    _native.call("dwconv_gelu_forward", x, *addresses, shape, code)
    return out


def _run_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    grad_out, x, weight, bias = (t.contiguous() for t in (grad_out, x, weight, bias))
    grad_x = _like(x)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(weight), torch.zeros_like(bias)
    shape, code = (x.shape[0], height, width, x.shape[2]), _native.DTYPE_CODES[x.dtype]
    # Parts of the gradients of the nine taps and of the bias.
    partial = weight.new_empty(_parts(shape, backend), 10, x.shape[2])
    tensors = (grad_out, x, weight, bias, partial, grad_x)
    if backend == "triton":
        from kernelpose.triton_kernels import dwconv_gelu as kernels

        kernels.backward(*tensors, (height, width))
    else:
        addresses = [_native.address(t) for t in tensors]
        _native.call("dwconv_gelu_backward", x, *addresses, shape, code)
    grad_weight = partial[:, :9].sum(0).t().contiguous().view(weight.shape)
    return grad_x, grad_weight, partial[:, 9].sum(0)


def _parts(shape: tuple[int, int, int, int], backend: str) -> int:
    batch, height, width, _ = shape
    if backend == "cpu":
        return batch
    if backend == "triton":
        from kernelpose.triton_kernels import dwconv_gelu as kernels

        return kernels.parts(batch, (height, width))
    assert _native.core is not None
    parts: int = _native.core.cuda_dwconv_gelu_parts(shape)
    return parts


def _like(tensor: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _gradients(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(weight), _like(bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.arguments = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    tensors = (grad_out, *ctx.saved_tensors)
    run = _run_backward if is_plain(*tensors) else _op_backward
    return *run(*tensors, *ctx.arguments), None, None, None


_PARAMETERS = "Tensor x, Tensor weight, Tensor bias, SymInt height, SymInt width, str backend"
_op_backward = register(
    "dwconv_gelu_backward",
    f"(Tensor grad_out, {_PARAMETERS}) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _gradients,
    autograd=no_second_derivative("dwconv_gelu"),
    autocast=False,
)
_op = register(
    "dwconv_gelu",
    f"({_PARAMETERS}) -> Tensor",
    _run_forward,
    _like,
    autograd=(_setup_context, _backward),
)


def _objection(backend: str, x: Tensor, *_: Any, **__: Any) -> str | None:
    """Beyond a GPU's grid, or Triton's 32-bit places in an image."""
    if backend == "cpu" or torch.compiler.is_exporting():  # or sizes would get an upper bound
        return None
    batch, tokens, channels = x.shape
    limits = [("tokens of 32 channels", batch * tokens * ((channels + 31) // 32))]
    if backend == "triton":
        limits.append(("elements of an image", tokens * channels))
    for what, count in limits:
        if count >= 2**31:
            return f"it takes fewer than {2**31} {what}, and this has {count}"
    return None


def _automatic(x: Tensor) -> tuple[str, ...]:
    """On a GPU nothing was measured yet; CUDA C++ stands first."""
    return {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}.get(x.device.type, ())


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The hidden tokens of HRPVT's first stage."""
    x = torch.empty(8, 3072, 512, device=device, dtype=dtype)
    weight, bias = (torch.empty(s, device=device) for s in ((512, 1, 3, 3), (512,)))
    return (x, weight, bias), {"size": (64, 48)}


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

register_backends(
    OpSpec(
        name="dwconv_gelu",
        dtypes={
            "cuda": _FLOATS,
            "triton": _FLOATS,
            "cpu": (*_FLOATS, torch.float64),
            "eager": (*_FLOATS, torch.float64),
        },
        directions="fwd+bwd",
        automatic=_automatic,
        objection=_objection,
        example=_example,
    )
)
