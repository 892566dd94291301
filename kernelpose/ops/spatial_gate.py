"""The gate of SCConv's spatial reconstruction unit (SRU): normalise, gate and cross-reconstruct."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernelpose import _native
from kernelpose.backend import OpSpec, choose
from kernelpose.backend import register as register_backends
from kernelpose.ops._maps import check_maps, memory_format, native_shape, statistics_dtype
from kernelpose.ops._register import is_plain, no_second_derivative, register
from kernelpose.reference.spatial_gate import spatial_gate as reference

MAX_UNIT_CHANNELS = 8192  # kMaxUnitChannels of csrc/cuda/spatial_gate.h


def spatial_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    threshold: float = 0.5,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """The spatial reconstruction unit of SCConv (CVPR 2023), as the code of MiTPOSE has it.

    With y = group_norm(x, weight, bias), r = sigmoid(y · weight / sum(weight)) and r x split at the
    threshold, A = x where r > threshold and r x elsewhere, B = 0 where r > threshold and r x
    elsewhere, the result is [A_1 + B_2, A_2 + B_1], 1 and 2 being the halves of the channels.

    Args:
        x: (B, C, H, W) in either memory format, contiguous or channels_last, which the result and
            the gradient keep; anything else is copied once. C is even. float32, float16, bfloat16
            (or float64 on a CPU).
        weight, bias: (C,), of the group normalisation, in any floating-point dtype.
        groups: groups of channels that are normalised together; it divides C.
        threshold: from 0 to 1.
        eps: added to the variance, at least 0.
        backend: "cuda", "triton", "cpu" or "eager"; None chooses, see `kernelpose.backend`.

    Returns:
        A tensor like x; all is computed in float32 (float64 for float64), under autocast as well.
        The result jumps where r passes the threshold; the gradient is that of either side. The
        backward pass is deterministic; a second derivative needs "eager".

    Raises:
        ValueError: a shape or number does not fit. TypeError: not a floating-point tensor.
        BackendError: the backend asked for cannot run this.
    """
    check_maps("x", x)
    _check(x, weight, bias, groups, threshold, eps)
    chosen = choose("spatial_gate", backend, x, weight, bias, groups=groups)
    if chosen == "eager":
        return reference(x, weight, bias, groups, threshold, eps)
    dtype = statistics_dtype(x)
    weight, bias = weight.to(dtype), bias.to(dtype)
    run = _run_forward if is_plain(x, weight, bias) else _op
    out: Tensor = run(x, weight, bias, groups, threshold, eps, chosen)[0]
    return out


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, threshold: float, eps: float
) -> None:
    channels = x.shape[1]
    if channels == 0 or channels % 2:
        raise ValueError(f"x has {channels} channels; expected an even number of them.")
    if not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}; expected a divisor of the {channels} channels.")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name} is {type(parameter).__name__}; expected a tensor.")
        if not parameter.is_floating_point():
            raise TypeError(f"{name} is {parameter.dtype}; expected a floating-point tensor.")
        if tuple(parameter.shape) != (channels,):
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}; expected ({channels},).")
        if parameter.device != x.device:
            raise ValueError(f"{name} is on {parameter.device}; expected {x.device}, as x.")
    for name, number in (("threshold", threshold), ("eps", eps)):
        if not isinstance(number, int | float):
            raise TypeError(f"{name} is {number!r}; expected a number.")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected 0 to 1.")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; expected at least 0.")


def _limit(threshold: float) -> float:
    """What the argument of the sigmoid exceeds where the sigmoid exceeds the threshold."""
    if threshold in (0, 1):
        return math.inf if threshold else -math.inf
    return math.log(threshold) - math.log1p(-threshold)


def _run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    threshold: float,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out, statistics): statistics (B, groups, 2) are mean and reciprocal deviation."""
    x = x.contiguous(memory_format=memory_format(x))
    weight, bias = weight.contiguous(), bias.contiguous()
    out, statistics = _outputs(x, weight, bias, groups)
    if x.numel() == 0:
        return out, statistics.zero_()
    scratch = _scratch(x, statistics)
    if backend == "triton":
        from kernelpose.triton_kernels import spatial_gate as kernels

        kernels.forward(x, weight, bias, out, statistics, scratch, _limit(threshold), eps)
        return out, statistics
    addresses = [_native.address(t) for t in (x, weight, bias, out, statistics, scratch)]
    shape = (*native_shape(x), groups, _limit(threshold), eps)
    _native.call("spatial_gate_forward", x, *addresses, shape, _native.DTYPE_CODES[x.dtype])
    return out, statistics


def _run_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    groups: int,
    threshold: float,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    layout = memory_format(x)
    grad_out, x = (t.contiguous(memory_format=layout) for t in (grad_out, x))
    weight, bias, statistics = (t.contiguous() for t in (weight, bias, statistics))
    grad_x, grad_weight, grad_bias = gradients = _gradients(x, weight)
    if x.numel() == 0:
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    scratch = _scratch(x, statistics)
    tensors = (grad_out, x, weight, bias, statistics, *gradients, scratch)
    if backend == "triton":
        from kernelpose.triton_kernels import spatial_gate as kernels

        kernels.backward(*tensors, _limit(threshold))
        return gradients
    addresses = [_native.address(t) for t in tensors]
    shape = (*native_shape(x), groups, _limit(threshold), eps)
    _native.call("spatial_gate_backward", x, *addresses, shape, _native.DTYPE_CODES[x.dtype])
    return gradients


def _scratch(x: Tensor, statistics: Tensor) -> Tensor:
    """Two sums of each channel, and, for the CUDA kernels, a number for each group at most."""
    return statistics.new_empty(2 * x.shape[0] * x.shape[1] + statistics.numel() // 2)


def _outputs(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, *_: Any
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=memory_format(x))
    return out, weight.new_empty(x.shape[0], groups, 2)


def _gradients(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    return grad_x, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, *ctx.arguments = inputs
    ctx.save_for_backward(x, weight, bias, output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    tensors = (grad_out, *ctx.saved_tensors)
    run = _run_backward if is_plain(*tensors) else _op_backward
    return *run(*tensors, *ctx.arguments), *(None for _ in ctx.arguments)


_ARGUMENTS = "int groups, float threshold, float eps, str backend"

_op_backward = register(
    "spatial_gate_backward",
    f"(Tensor grad_out, Tensor x, Tensor weight, Tensor bias, Tensor statistics, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor)",
    _run_backward,
    lambda grad_out, x, weight, *_: _gradients(x, weight),
    autograd=no_second_derivative("spatial_gate"),
    autocast=False,
)
_op = register(
    "spatial_gate",
    f"(Tensor x, Tensor weight, Tensor bias, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _run_forward,
    _outputs,
    autograd=(_setup_context, _backward),
    autocast=False,
)


def _objection(backend: str, x: Tensor, *_: Any, groups: int, **__: Any) -> str | None:
    if backend == "cpu" or torch.compiler.is_exporting():  # or sizes would get an upper bound
        return None
    batch, channels, height, width = x.shape
    unit = channels if groups % 2 else 2 * channels // groups
    limits = [
        ("channels of all images", batch * channels, 2**31),
        ("elements of an image", channels * height * width, 2**31),
    ]
    if backend == "cuda":  # sums over a unit are in shared memory
        limits.append(("channels of a pair of groups", unit, MAX_UNIT_CHANNELS + 1))
    for what, count, limit in limits:
        if count >= limit:
            return f"it takes fewer than {limit} {what}, and this has {count}"
    return None


def _automatic(x: Tensor) -> tuple[str, ...]:
    """On a GPU nothing was measured yet; CUDA C++ stands first."""
    return {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}.get(x.device.type, ())


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The map of MiTPOSE-B, as its tokens lie."""
    x = torch.empty(8, 768, 16, 12, device=device, dtype=dtype)
    weight = torch.empty(768, device=device)
    x = x.to(memory_format=torch.channels_last)
    return (x, weight, torch.empty_like(weight)), {"groups": 4}


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

register_backends(
    OpSpec(
        name="spatial_gate",
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
