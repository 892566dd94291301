"""The channel gate and the spatial gate of one feature map, applied together."""

from __future__ import annotations

from collections.abc import Sequence
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
from kernelpose.ops._register import is_plain, no_autocast, no_second_derivative, register
from kernelpose.reference.dual_gate import dual_gate as reference

KERNEL = 7


def dual_gate(
    y: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    spatial_weight: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """(a + s) · y: CBAM's two gates (arXiv 1807.06521), both of y itself instead of in series.

    a = sigmoid(f(mean of y over the pixels) + f(its maximum)), one number a channel, with
    f(v) = expand_weight relu(reduce_weight v); s = sigmoid(spatial_weight correlated with the maps
    of y's mean and maximum over the channels, zeros around), one number a pixel.

    Args:
        y: (B, C, H, W) in either memory format, contiguous or channels_last, which the result and
            the gradient keep; anything else is copied once. float32, float16, bfloat16 (or float64
            on a CPU).
        reduce_weight: (R, C, 1, 1). expand_weight: (C, R, 1, 1). spatial_weight: (1, 2, 7, 7), for
            the mean and then the maximum. Of any floating-point dtype.
        backend: "cuda", "triton", "cpu" or "eager"; None chooses, see `kernelpose.backend`.

    Returns:
        A tensor like y; all is computed in float32 (float64 for float64), under autocast as well.
        Values that share a maximum share its gradient evenly. The backward pass is deterministic; a
        second derivative needs "eager".

    Raises:
        ValueError: a shape does not fit. TypeError: not a floating-point tensor.
        BackendError: the backend asked for cannot run this.
    """
    check_maps("y", y)
    _check(y, reduce_weight, expand_weight, spatial_weight)
    weights = (reduce_weight, expand_weight, spatial_weight)
    chosen = choose("dual_gate", backend, y, *weights)
    if chosen == "eager":
        with no_autocast(y):
            return reference(y, *weights)
    dtype = statistics_dtype(y)
    if any(weight.dtype != dtype for weight in weights):
        reduce_weight, expand_weight, spatial_weight = (weight.to(dtype) for weight in weights)
    run = _run_forward if is_plain(y, *weights) else _op
    out: Tensor = run(y, reduce_weight, expand_weight, spatial_weight, chosen)[0]
    return out


def _check(y: Tensor, reduce_weight: Any, expand_weight: Any, spatial_weight: Any) -> None:
    for name, weight in (
        ("reduce_weight", reduce_weight),
        ("expand_weight", expand_weight),
        ("spatial_weight", spatial_weight),
    ):
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name} is {type(weight).__name__}; expected a tensor.")
        if not weight.is_floating_point():
            raise TypeError(f"{name} is {weight.dtype}; expected a floating-point tensor.")
        if weight.device != y.device:
            raise ValueError(f"{name} is on {weight.device}; expected {y.device}, as y.")
    channels = y.shape[1]
    if 0 in y.shape[1:]:
        raise ValueError(f"y has shape {tuple(y.shape)}; expected a channel and a pixel at least.")
    hidden = reduce_weight.shape[0] if reduce_weight.ndim else 0
    if reduce_weight.shape != (hidden, channels, 1, 1) or hidden < 1:
        raise ValueError(
            f"reduce_weight has shape {tuple(reduce_weight.shape)}; expected (R, {channels}, 1, 1) "
            f"for the {channels} channels of y."
        )
    if expand_weight.shape != (channels, hidden, 1, 1):
        raise ValueError(
            f"expand_weight has shape {tuple(expand_weight.shape)}; expected "
            f"{(channels, hidden, 1, 1)}, the inverse of reduce_weight."
        )
    if spatial_weight.shape != (1, 2, KERNEL, KERNEL):
        raise ValueError(
            f"spatial_weight has shape {tuple(spatial_weight.shape)}; expected "
            f"{(1, 2, KERNEL, KERNEL)}."
        )


def _run_forward(
    y: Tensor, reduce_weight: Tensor, expand_weight: Tensor, spatial_weight: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """(out, state): see csrc/include/kernelpose/dual_gate.h."""
    y = y.contiguous(memory_format=memory_format(y))
    weights = [w.contiguous() for w in (reduce_weight, expand_weight, spatial_weight)]
    out, state = _outputs(y, *weights)
    if y.numel() == 0:
        return out, state
    if backend == "triton":
        from kernelpose.triton_kernels import dual_gate as kernels

        return out, kernels.forward(y, weights, out)
    _call("dual_gate_forward", y, reduce_weight, (y, *weights, out, state))
    return out, state


def _run_backward(
    grad_out: Tensor,
    y: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    spatial_weight: Tensor,
    state: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y and of the three weights."""
    layout = memory_format(y)
    grad_out, y = (t.contiguous(memory_format=layout) for t in (grad_out, y))
    weights = [w.contiguous() for w in (reduce_weight, expand_weight, spatial_weight)]
    state = state.contiguous()
    batch, channels = y.shape[:2]
    hidden = reduce_weight.shape[0]
    grad_y = torch.empty_like(y, memory_format=layout)
    partials = state.new_empty(batch, channels + 2 * hidden + 2 * KERNEL * KERNEL)
    if backend == "triton" and y.numel():
        from kernelpose.triton_kernels import dual_gate as kernels

        kernels.backward(grad_out, y, weights, state, grad_y, partials)
    elif y.numel():
        tensors = (grad_out, y, *weights, state, grad_y, partials)
        _call("dual_gate_backward", y, reduce_weight, tensors)
    of_sigmoids, of_hidden, of_kernel = partials.split(
        (channels, 2 * hidden, 2 * KERNEL * KERNEL), 1
    )
    pooled = state[:, : 2 * channels].reshape(-1, channels)
    active = state[:, -2 * hidden :].relu().view(batch, 2, hidden).sum(1)
    return (
        grad_y,
        (of_hidden.reshape(-1, hidden).t() @ pooled).view(reduce_weight.shape),
        (of_sigmoids.t() @ active).view(expand_weight.shape),
        of_kernel.sum(0).view(spatial_weight.shape),
    )


def _call(function: str, y: Tensor, reduce_weight: Tensor, tensors: Sequence[Tensor]) -> None:
    shape = (*native_shape(y), y.shape[3], reduce_weight.shape[0])
    memory = _native.workspace("dual_gate", y, shape)
    addresses = [_native.address(t) for t in (*tensors, *([memory] if y.is_cuda else []))]
    _native.call(function, y, *addresses, shape, _native.DTYPE_CODES[y.dtype])


def _outputs(y: Tensor, reduce_weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = y.shape
    size = 3 * (channels + height * width) + 2 * reduce_weight.shape[0]
    out = torch.empty_like(y, memory_format=memory_format(y))
    return out, y.new_empty(batch, size, dtype=statistics_dtype(y))


def _gradients(grad_out: Tensor, y: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    grad_y = torch.empty_like(y, memory_format=memory_format(y))
    return grad_y, *(weight.new_empty(weight.shape) for weight in tensors[:3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, reduce_weight, expand_weight, spatial_weight, *ctx.arguments = inputs
    ctx.save_for_backward(y, reduce_weight, expand_weight, spatial_weight, output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    tensors = (grad_out, *ctx.saved_tensors)
    run = _run_backward if is_plain(*tensors) else _op_backward
    return *run(*tensors, *ctx.arguments), None


_op_backward = register(
    "dual_gate_backward",
    "(Tensor grad_out, Tensor y, Tensor reduce_weight, Tensor expand_weight, "
    "Tensor spatial_weight, Tensor state, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _gradients,
    autograd=no_second_derivative("dual_gate"),
    autocast=False,
)
_op = register(
    "dual_gate",
    "(Tensor y, Tensor reduce_weight, Tensor expand_weight, Tensor spatial_weight, str backend) "
    "-> (Tensor, Tensor)",
    _run_forward,
    _outputs,
    autograd=(_setup_context, _backward),
    autocast=False,
)


def _objection(backend: str, y: Tensor, *_: Any, **__: Any) -> str | None:
    return too_large(backend, y)


def _automatic(y: Tensor) -> tuple[str, ...]:
    """On a GPU nothing was measured yet; CUDA C++ stands first."""
    return {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}.get(y.device.type, ())


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The map that MiTPOSE-B gates, as its tokens lie."""
    y = torch.empty(8, 768, 16, 12, device=device, dtype=dtype)
    shapes = ((48, 768, 1, 1), (768, 48, 1, 1), (1, 2, KERNEL, KERNEL))
    weights = (torch.empty(shape, device=device) for shape in shapes)
    return (y.to(memory_format=torch.channels_last), *weights), {}


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

register_backends(
    OpSpec(
        name="dual_gate",
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
