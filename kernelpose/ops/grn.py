"""Global response normalisation of feature maps, with its affine part and its residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelpose import _native
from kernelpose.backend import OpSpec, choose
from kernelpose.backend import register as register_backends
from kernelpose.ops._maps import (
    check_maps,
    memory_format,
    native_shape,
    statistics_dtype,
    too_large,
)
from kernelpose.ops._register import is_plain, no_second_derivative, register
from kernelpose.reference.grn import grn as reference


def grn(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    eps: float = 1e-6,
    channels_last: bool = False,
    backend: str | None = None,
) -> Tensor:
    """gamma · x · n + beta + x, where n = g / (mean of g over the channels + eps), and g is the L2
    norm of each channel of each image over its pixels (ConvNeXt V2, arXiv 2301.00808).

    Args:
        x: (B, C, H, W) in either memory format, contiguous or channels_last, which the result and
            the gradient keep; anything else is copied once. float32, float16, bfloat16 (or float64
            on a CPU).
        gamma, beta: C elements each, in any shape and any floating-point dtype.
        eps: added to the mean norm, at least 0.
        channels_last: x and the result are (B, H, W, C).
        backend: "cuda", "triton", "cpu" or "eager"; None chooses, see `kernelpose.backend`.

    Returns:
        A tensor like x; all is computed in float32 (float64 for float64), under autocast as well.
        The backward pass is deterministic; a second derivative needs "eager".

    Raises:
        ValueError: a shape or eps does not fit. TypeError: not a floating-point tensor.
        BackendError: the backend asked for cannot run this.
    """
    check_maps("x", x, "(B, H, W, C)" if channels_last else "(B, C, H, W)")
    if channels_last:
        x = x.permute(0, 3, 1, 2)
    _check(x, gamma, beta, eps)
    chosen = choose("grn", backend, x, gamma, beta)
    if chosen == "eager":
        out = reference(x, gamma, beta, eps)
    else:
        dtype = statistics_dtype(x)
        gamma, beta = (p.reshape(-1).to(dtype) for p in (gamma, beta))
        run = _run_forward if is_plain(x, gamma, beta) else _op
        out = run(x, gamma, beta, eps, chosen)[0]
    return out.permute(0, 2, 3, 1) if channels_last else out


def _check(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> None:
    for name, parameter in (("gamma", gamma), ("beta", beta)):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name} is {type(parameter).__name__}; expected a tensor.")
        if not parameter.is_floating_point():
            raise TypeError(f"{name} is {parameter.dtype}; expected a floating-point tensor.")
        if parameter.numel() != x.shape[1]:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}; expected one element for each of the "
                f"{x.shape[1]} channels of x."
            )
        if parameter.device != x.device:
            raise ValueError(f"{name} is on {parameter.device}; expected {x.device}, as x.")
    if not isinstance(eps, int | float):
        raise TypeError(f"eps is {eps!r}; expected a number.")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; expected at least 0.")


def _run_forward(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    """(out, norms): norms (B, C) is g."""
    x = x.contiguous(memory_format=memory_format(x))
    gamma, beta = gamma.contiguous(), beta.contiguous()
    out, norms = _outputs(x)
    if x.numel() == 0:
        return out, norms.zero_()
    if backend == "triton":
        from kernelpose.triton_kernels import grn as kernels

        kernels.forward(x, gamma, beta, out, norms, eps)
        return out, norms
    addresses = [_native.address(t) for t in (x, gamma, beta, out, norms)]
    shape, code = (*native_shape(x), eps), _native.DTYPE_CODES[x.dtype]
    _native.call("grn_forward", x, *addresses, shape, code)
    return out, norms


def _run_backward(
    grad_out: Tensor, x: Tensor, gamma: Tensor, norms: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gamma and beta."""
    layout = memory_format(x)
    grad_out, x = (t.contiguous(memory_format=layout) for t in (grad_out, x))
    gamma, norms = gamma.contiguous(), norms.contiguous()
    grad_x, grad_gamma, grad_beta = _gradients(x, gamma)
    if x.numel() == 0:
        return grad_x, grad_gamma.zero_(), grad_beta.zero_()
    sums = norms.new_empty(3, *norms.shape)  # see csrc/cpu/grn.h
    if backend == "triton":
        from kernelpose.triton_kernels import grn as kernels

        kernels.backward(grad_out, x, gamma, norms, sums, grad_x, eps)
    else:
        addresses = [_native.address(t) for t in (grad_out, x, gamma, norms, sums, grad_x)]
        shape, code = (*native_shape(x), eps), _native.DTYPE_CODES[x.dtype]
        _native.call("grn_backward", x, *addresses, shape, code)
    torch.sum(sums[2], 0, out=grad_gamma)
    torch.sum(sums[1], 0, out=grad_beta)
    return grad_x, grad_gamma, grad_beta


def _outputs(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=memory_format(x))
    return out, x.new_empty(x.shape[:2], dtype=statistics_dtype(x))


def _gradients(x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    return grad_x, gamma.new_empty(gamma.shape), gamma.new_empty(gamma.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gamma, _, *ctx.arguments = inputs
    ctx.save_for_backward(x, gamma, output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    tensors = (grad_out, *ctx.saved_tensors)
    run = _run_backward if is_plain(*tensors) else _op_backward
    return *run(*tensors, *ctx.arguments), None, None


_op_backward = register(
    "grn_backward",
    "(Tensor grad_out, Tensor x, Tensor gamma, Tensor norms, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _run_backward,
    lambda grad_out, x, gamma, *_: _gradients(x, gamma),
    autograd=no_second_derivative("grn"),
    autocast=False,
)
_op = register(
    "grn",
    "(Tensor x, Tensor gamma, Tensor beta, float eps, str backend) -> (Tensor, Tensor)",
    _run_forward,
    _outputs,
    autograd=(_setup_context, _backward),
    autocast=False,
)


def _objection(backend: str, x: Tensor, *_: Any, **__: Any) -> str | None:
    return too_large(backend, x)


def _automatic(x: Tensor) -> tuple[str, ...]:
    """On a GPU nothing was measured yet; CUDA C++ stands first."""
    return {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}.get(x.device.type, ())


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The map that MiTPOSE-B normalises, as its tokens lie."""
    x = torch.empty(8, 768, 16, 12, device=device, dtype=dtype)
    gamma = torch.empty(768, device=device)
    return (x.to(memory_format=torch.channels_last), gamma, torch.empty_like(gamma)), {}


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

register_backends(
    OpSpec(
        name="grn",
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
