"""The weighted sum of two feature maps, by the softmax of their channels' means."""

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
from kernelpose.reference.channel_fuse import channel_fuse as reference


def channel_fuse(
    y1: Tensor, y2: Tensor, *, softmax: str = "joint", backend: str | None = None
) -> Tensor:
    """w1 · y1 + w2 · y2, where w1 and w2 (B, C) are the softmax of the means of y1's and y2's
    channels over their pixels: the tail of CRU (SCConv, CVPR 2023).

    Args:
        y1, y2: (B, C, H, W) in either memory format, contiguous or channels_last, which the result
            and the gradients have from y1; anything else is copied once. float32, float16, bfloat16
            (or float64 on a CPU).
        softmax: "joint", over all 2C channels of an image, as the released code does it; or
            "pairwise", over the two maps, channel by channel, as the paper has it.
        backend: "cuda", "triton", "cpu" or "eager"; None chooses, see `kernelpose.backend`.

    Returns:
        A tensor like y1; all is computed in float32 (float64 for float64), under autocast as well.
        The backward pass is deterministic; a second derivative needs "eager".

    Raises:
        ValueError: a shape or softmax does not fit. TypeError: not a floating-point tensor, or two
        dtypes. BackendError: the backend asked for cannot run this.
    """
    _check(y1, y2, softmax)
    chosen = choose("channel_fuse", backend, y1, y2)
    if chosen == "eager":
        return reference(y1, y2, softmax)
    run = _run_forward if is_plain(y1, y2) else _op
    out: Tensor = run(y1, y2, softmax, chosen)[0]
    return out


def _check(y1: Tensor, y2: Tensor, softmax: str) -> None:
    check_maps("y1", y1)
    check_maps("y2", y2)
    if y2.shape != y1.shape:
        raise ValueError(f"y2 has shape {tuple(y2.shape)}; expected {tuple(y1.shape)}, as y1.")
    if y2.dtype != y1.dtype:
        raise TypeError(f"y2 is {y2.dtype}; expected {y1.dtype}, as y1.")
    if y2.device != y1.device:
        raise ValueError(f"y2 is on {y2.device}; expected {y1.device}, as y1.")
    if softmax not in ("joint", "pairwise"):
        raise ValueError(f"softmax is {softmax!r}; expected 'joint' or 'pairwise'.")


def _run_forward(y1: Tensor, y2: Tensor, softmax: str, backend: str) -> tuple[Tensor, Tensor]:
    """(out, means): means (B, 2, C) of y1's and y2's channels."""
    layout = memory_format(y1)
    y1, y2 = (t.contiguous(memory_format=layout) for t in (y1, y2))
    out, means = _outputs(y1)
    if y1.numel() == 0:
        return out, means.zero_()
    if backend == "triton":
        from kernelpose.triton_kernels import channel_fuse as kernels

        kernels.forward(y1, y2, out, means, softmax == "pairwise")
        return out, means
    addresses = [_native.address(t) for t in (y1, y2, out, means)]
    shape, code = (*native_shape(y1), softmax == "pairwise"), _native.DTYPE_CODES[y1.dtype]
    _native.call("channel_fuse_forward", y1, *addresses, shape, code)
    return out, means


def _run_backward(
    grad_out: Tensor, y1: Tensor, y2: Tensor, means: Tensor, softmax: str, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of y1 and y2."""
    layout = memory_format(y1)
    grad_out, y1, y2 = (t.contiguous(memory_format=layout) for t in (grad_out, y1, y2))
    means = means.contiguous()
    grad_y1, grad_y2 = _gradients(y1)
    if y1.numel() == 0:
        return grad_y1, grad_y2
    products = torch.empty_like(means)  # of grad_out and each map, summed over the pixels
    if backend == "triton":
        from kernelpose.triton_kernels import channel_fuse as kernels

        tensors = (grad_out, y1, y2, means, products, grad_y1, grad_y2)
        kernels.backward(*tensors, softmax == "pairwise")
        return grad_y1, grad_y2
    addresses = [_native.address(t) for t in (grad_out, y1, y2, means, products, grad_y1, grad_y2)]
    shape, code = (*native_shape(y1), softmax == "pairwise"), _native.DTYPE_CODES[y1.dtype]
    _native.call("channel_fuse_backward", y1, *addresses, shape, code)
    return grad_y1, grad_y2


def _outputs(y1: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(y1, memory_format=memory_format(y1))
    return out, y1.new_empty(y1.shape[0], 2, y1.shape[1], dtype=statistics_dtype(y1))


def _gradients(y1: Tensor) -> tuple[Tensor, Tensor]:
    layout = memory_format(y1)
    return torch.empty_like(y1, memory_format=layout), torch.empty_like(y1, memory_format=layout)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y1, y2, *ctx.arguments = inputs
    ctx.save_for_backward(y1, y2, output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    tensors = (grad_out, *ctx.saved_tensors)
    run = _run_backward if is_plain(*tensors) else _op_backward
    return *run(*tensors, *ctx.arguments), None, None


_op_backward = register(
    "channel_fuse_backward",
    "(Tensor grad_out, Tensor y1, Tensor y2, Tensor means, str softmax, str backend) "
    "-> (Tensor, Tensor)",
    _run_backward,
    lambda grad_out, y1, *_: _gradients(y1),
    autograd=no_second_derivative("channel_fuse"),
    autocast=False,
)
_op = register(
    "channel_fuse",
    "(Tensor y1, Tensor y2, str softmax, str backend) -> (Tensor, Tensor)",
    _run_forward,
    _outputs,
    autograd=(_setup_context, _backward),
    autocast=False,
)


def _objection(backend: str, y1: Tensor, *_: Any, **__: Any) -> str | None:
    return too_large(backend, y1)


def _automatic(y1: Tensor) -> tuple[str, ...]:
    """On a GPU nothing was measured yet; CUDA C++ stands first."""
    return {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}.get(y1.device.type, ())


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The maps that MiTPOSE-B fuses, as its tokens lie."""
    y1 = torch.empty(8, 768, 16, 12, device=device, dtype=dtype)
    y1 = y1.to(memory_format=torch.channels_last)
    return (y1, torch.empty_like(y1)), {}


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

register_backends(
    OpSpec(
        name="channel_fuse",
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
