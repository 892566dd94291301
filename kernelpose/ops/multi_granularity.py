"""Depthwise convolutions of three sizes and their grouped mix, of one read of the maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from kernelpose.ops._register import autocast, is_plain, no_second_derivative, register
from kernelpose.reference.multi_granularity import multi_granularity as reference

SIDES = (7, 5, 3)
MAX_GROUP_CHANNELS = 96  # whose mix fits the shared memory of a block; as in csrc/cuda


def multi_granularity(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    mix_weight: Tensor,
    mix_bias: Tensor,
    *,
    groups: int = 16,
    backend: str | None = None,
) -> Tensor:
    """x + the grouped mix of x's depthwise 7x7, 5x5 and 3x3 convolutions D, with zeros around.

    Group j of the mix takes the j-th part of the channels of D_7, then of D_5, then of D_3: what a
    1x1 convolution of 3C channels in `groups` groups computes of those, so ordered.

    Args:
        x: (B, C, H, W) in either memory format, contiguous or channels_last, which the result and
            the gradient keep; anything else is copied once. float32, float16, bfloat16 (or float64
            on a CPU).
        weights: (C, 1, 7, 7), (C, 1, 5, 5), (C, 1, 3, 3). biases: (C,) of each.
        mix_weight: (C, 3C / groups, 1, 1). mix_bias: (C,). All of any floating-point dtype.
        groups: a divisor of C.
        backend: "cuda", "triton", "cpu" or "eager"; None chooses, see `kernelpose.backend`.

    Returns:
        A tensor like x; kernels compute in float32 (float64 for float64). Under autocast x is cast
        to autocast's dtype. The backward pass is deterministic; a second derivative needs "eager".

    Raises:
        ValueError: a shape or groups does not fit. TypeError: not a floating-point tensor.
        BackendError: the backend asked for cannot run this.
    """
    check_maps("x", x)
    _check(x, weights, biases, mix_weight, mix_bias, groups)
    x = autocast(x)
    chosen = choose(
        "multi_granularity", backend, x, weights, biases, mix_weight, mix_bias, groups=groups
    )
    if chosen == "eager":
        return reference(x, weights, biases, mix_weight, mix_bias, groups)
    parameters = [*weights, *biases, mix_weight, mix_bias]
    dtype = statistics_dtype(x)
    if any(p.dtype != dtype for p in parameters):
        parameters = [p.to(dtype) for p in parameters]
    run: Callable[..., Tensor] = _run_forward if is_plain(x, *parameters) else _op
    return run(x, *parameters, groups, chosen)


def _check(
    x: Tensor, weights: Any, biases: Any, mix_weight: Any, mix_bias: Any, groups: Any
) -> None:
    channels = x.shape[1]
    if 0 in x.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected a channel and a pixel at least.")
    if not isinstance(groups, int):
        raise TypeError(f"groups is {groups!r}; expected an integer.")
    if groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}; expected a divisor of the {channels} channels of x.")
    for name, tensors in (("weights", weights), ("biases", biases)):
        if not isinstance(tensors, list | tuple):
            raise TypeError(f"{name} is {type(tensors).__name__}; expected three tensors.")
        if len(tensors) != len(SIDES):
            raise ValueError(f"{name} has length {len(tensors)}; expected three tensors.")
    expected: list[tuple[str, Any, tuple[int, ...]]] = [
        ("mix_weight", mix_weight, (channels, len(SIDES) * channels // groups, 1, 1)),
        ("mix_bias", mix_bias, (channels,)),
    ]
    for i, (weight, bias, side) in enumerate(zip(weights, biases, SIDES, strict=True)):
        expected.append((f"weights[{i}]", weight, (channels, 1, side, side)))
        expected.append((f"biases[{i}]", bias, (channels,)))
    for name, tensor, shape in expected:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; expected a tensor.")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; expected a floating-point tensor.")
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}.")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, as x.")


def _run_forward(
    x: Tensor,
    weight7: Tensor,
    weight5: Tensor,
    weight3: Tensor,
    bias7: Tensor,
    bias5: Tensor,
    bias3: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor,
    groups: int,
    backend: str,
) -> Tensor:
    x = x.contiguous(memory_format=memory_format(x))
    given = (weight7, weight5, weight3, bias7, bias5, bias3, mix_weight, mix_bias)
    parameters = [p.contiguous() for p in given]
    out = _output(x)
    if backend == "triton" and x.numel():
        from kernelpose.triton_kernels import multi_granularity as kernels

        kernels.forward(x, parameters, out, groups)
    elif x.numel():
        addresses = [_native.address(p) for p in parameters]
        shape, code = (*native_shape(x), x.shape[3], groups), _native.DTYPE_CODES[x.dtype]
        x_out = _native.address(x), _native.address(out)
        _native.call("multi_granularity_forward", x, x_out[0], addresses, x_out[1], shape, code)
    return out


def _run_backward(
    grad_out: Tensor,
    x: Tensor,
    weight7: Tensor,
    weight5: Tensor,
    weight3: Tensor,
    bias7: Tensor,
    bias5: Tensor,
    bias3: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor,
    groups: int,
    backend: str,
) -> tuple[Tensor, ...]:
    """Gradients of x and of the parameters."""
    layout = memory_format(x)
    grad_out, x = (t.contiguous(memory_format=layout) for t in (grad_out, x))
    given = (weight7, weight5, weight3, bias7, bias5, bias3, mix_weight, mix_bias)
    parameters = [p.contiguous() for p in given]
    grad_x, *gradients = _gradients(grad_out, x, *parameters)
    if not x.numel():
        return grad_x, *(gradient.zero_() for gradient in gradients)
    if backend == "triton":
        from kernelpose.triton_kernels import multi_granularity_backward as kernels

        kernels.backward(grad_out, x, parameters, grad_x, gradients, groups)
        return grad_x, *gradients
    maps = [_native.address(t) for t in (grad_out, x, grad_x)]
    addresses, of_gradients = ([_native.address(t) for t in p] for p in (parameters, gradients))
    shape, code = (*native_shape(x), x.shape[3], groups), _native.DTYPE_CODES[x.dtype]
    memory = _native.workspace("multi_granularity_backward", x, shape, code)
    _native.call(
        "multi_granularity_backward", x,
        maps[0], maps[1], addresses, maps[2], of_gradients, _native.address(memory), shape, code,
    )  # fmt: skip
    return grad_x, *gradients


def _output(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def _gradients(grad_out: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _output(x), *(p.new_empty(p.shape) for p in arguments[:8])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, groups, backend = inputs
    ctx.arguments = groups, backend
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    tensors = (grad_out, *ctx.saved_tensors)
    run = _run_backward if is_plain(*tensors) else _op_backward
    return *run(*tensors, *ctx.arguments), None, None


_PARAMETERS = (
    "Tensor weight7, Tensor weight5, Tensor weight3, Tensor bias7, Tensor bias5, Tensor bias3, "
    "Tensor mix_weight, Tensor mix_bias, int groups, str backend"
)
_op_backward = register(
    "multi_granularity_backward",
    f"(Tensor grad_out, Tensor x, {_PARAMETERS}) -> ({', '.join(['Tensor'] * 9)})",
    _run_backward,
    _gradients,
    autograd=no_second_derivative("multi_granularity"),
    autocast=False,
)
_op = register(
    "multi_granularity",
    f"(Tensor x, {_PARAMETERS}) -> Tensor",
    _run_forward,
    _output,
    autograd=(_setup_context, _backward),
)


def _objection(backend: str, x: Tensor, *_: Any, groups: int = 16, **__: Any) -> str | None:
    batch, channels, height, width = x.shape
    if backend == "cuda" and channels // groups > MAX_GROUP_CHANNELS:
        return (
            f"it takes groups of at most {MAX_GROUP_CHANNELS} channels, and these have "
            f"{channels // groups}"
        )
    if backend == "triton" and not torch.compiler.is_exporting():
        weights = 3 * (channels // groups) ** 2
        programs = batch * (height * width // 16 + 1) * (channels // 16 + 1 + 3 * groups)
        for what, count in (("weights of a group's mix", weights), ("programs", programs)):
            if count >= 2**31:
                return f"it takes fewer than {2**31} {what}, and this has {count}"
    return too_large(backend, x, elements=True)


def _automatic(x: Tensor) -> tuple[str, ...]:
    """On a GPU nothing was measured yet; CUDA C++ stands first."""
    return {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}.get(x.device.type, ())


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The map of MiTPOSE-B's local perception, as its tokens lie."""
    x = torch.empty(8, 768, 16, 12, device=device, dtype=dtype)
    weights = [torch.empty(768, 1, side, side, device=device) for side in SIDES]
    bias, mix_weight = (torch.empty(s, device=device) for s in ((768,), (768, 144, 1, 1)))
    x = x.to(memory_format=torch.channels_last)
    return (x, weights, [bias] * 3, mix_weight, bias), {"groups": 16}


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

register_backends(
    OpSpec(
        name="multi_granularity",
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
