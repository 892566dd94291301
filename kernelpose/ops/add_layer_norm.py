"""The residual addition of a transformer block and the LayerNorm that follows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelpose import _native
from kernelpose.backend import OpSpec, choose, core_unasked, device_type
from kernelpose.backend import register as register_backends
from kernelpose.ops._maps import statistics_dtype
from kernelpose.ops._register import is_plain, no_second_derivative, register
from kernelpose.reference.add_layer_norm import add_layer_norm as reference

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TRITON_CHANNELS = 8192  # a row is one tile


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x + residual, and its LayerNorm over the last dimension (arXiv 1607.06450).

    Args:
        x, residual: (..., C), one shape; contiguous, or copied once. float32, float16, bfloat16 (or
            float64 on a CPU). They may differ, as a branch and its stream do under autocast; a
            16-bit one beside float32 is read as it is.
        weight, bias: (C,), of any floating-point dtype.
        eps: added to the variance, at least 0.
        backend: "cuda", "triton", "cpu" or "eager"; None chooses, see `kernelpose.backend`.

    Returns:
        (sum, norm), two contiguous tensors of that shape and of the dtype that x + residual has;
        norm is that of the sum as rounded to it, computed in float32 (float64 for float64), under
        autocast as well. The backward pass is deterministic; a second derivative needs "eager".

    Raises:
        ValueError: a shape or eps does not fit. TypeError: not a floating-point tensor.
        BackendError: the backend asked for cannot run this.
    """
    plain = is_plain(x, residual, weight, bias)
    simple = plain and _is_simple(x, residual, weight, bias, eps)
    if not simple:
        _check(x, residual, weight, bias, eps)
    if simple and backend is None and x.is_cpu and core_unasked():
        return _run_forward(x, residual, weight, bias, eps, "cpu", None)
    chosen = choose("add_layer_norm", backend, x, residual, weight, bias)
    if chosen == "eager":
        return reference(x, residual, weight, bias, eps)
    if not simple:
        x, residual, weight, bias = _convert(x, residual, weight, bias)
    if plain:
        return _run_forward(x, residual, weight, bias, eps, chosen, None)
    total, norm, _ = _op(x, residual, weight, bias, eps, chosen)
    return total, norm


def _is_simple(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> bool:
    """Whether `_check` and `_convert` would leave these plain tensors as they are: at batch 1 they
    take as long as the kernel."""
    return (
        x is not None
        and residual is not None
        and weight is not None
        and bias is not None
        and x.dtype in _FLOATS
        and residual.dtype is x.dtype
        and weight.dtype in _FLOATS
        and bias.dtype is weight.dtype
        and x.get_device() == residual.get_device() == weight.get_device() == bias.get_device()
        and x.shape == residual.shape
        and weight.shape == bias.shape == x.shape[-1:]
        and type(eps) is float
        and eps >= 0.0
    )


def _check(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    device = x.device if isinstance(x, Tensor) else None
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; expected a tensor.")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; expected a floating-point tensor.")
        if tensor is not x and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; expected {device}, as x.")
    shape = x.shape
    if not shape:
        raise ValueError("x has shape (); expected (..., C).")
    if residual.shape != shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}; expected {tuple(shape)}, as x."
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.ndim != 1 or tensor.shape[0] != shape[-1]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected ({shape[-1]},), one element for "
                "each channel of x."
            )
    if not isinstance(eps, int | float):
        raise TypeError(f"eps is {eps!r}; expected a number.")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; expected at least 0.")


def _convert(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in an order and in dtypes that kernels take: see AddLayerNormTypes in
    csrc/include/kernelpose/add_layer_norm.h."""
    if x.dtype != residual.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        if x.dtype == dtype == torch.float32:
            x, residual = residual, x
        elif residual.dtype != dtype or dtype == torch.float64:
            x, residual = x.to(dtype), residual.to(dtype)
    if weight.dtype != bias.dtype or torch.float64 in (weight.dtype, residual.dtype):
        dtype = statistics_dtype(residual)
        weight, bias = weight.to(dtype), bias.to(dtype)
    return x, residual, weight, bias


def _run_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    backend: str,
    moments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(sum, norm); moments (2, ...), where given, is filled with each row's mean and 1 / d."""
    x, residual = x.contiguous(), residual.contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    total, norm = torch.empty_like(residual), torch.empty_like(residual)
    channels, elements = weight.shape[0], x.numel()
    if elements == 0:
        return total, norm
    if backend == "triton":
        from kernelpose.triton_kernels import add_layer_norm as kernels

        kernels.forward(x, residual, weight, bias, total, norm, moments, eps)
        return total, norm
    codes = _native.DTYPE_CODES
    _native.call(
        "add_layer_norm_forward",
        x,
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        total.data_ptr(),
        norm.data_ptr(),
        _native.address(moments),
        (elements // channels, channels, eps),
        (codes[x.dtype], codes[residual.dtype], codes[weight.dtype]),
    )
    return total, norm


def _run_with_moments(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    moments = _moments(residual)
    total, norm = _run_forward(x, residual, weight, bias, eps, backend, moments)
    return total, norm, moments


def _run_backward(
    grad_sum: Tensor | None,
    grad_norm: Tensor,
    total: Tensor,
    moments: Tensor,
    weight: Tensor,
    x_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of residual, of x where it has its own dtype, and of weight and bias (2, C)."""
    grad_norm, total, moments = grad_norm.contiguous(), total.contiguous(), moments.contiguous()
    weight = weight.contiguous()
    if grad_sum is not None:
        grad_sum = grad_sum.contiguous()
    channels = weight.shape[0]
    grad_residual = torch.empty_like(total)
    grad_x = None if x_dtype is total.dtype else torch.empty_like(total, dtype=x_dtype)
    grad_parameters = moments.new_empty(2, channels)
    if total.numel() == 0:
        return grad_residual, grad_x, grad_parameters.zero_()
    tensors = (grad_sum, grad_norm, total, moments, weight, grad_residual, grad_x)
    if backend == "triton":
        from kernelpose.triton_kernels import add_layer_norm as kernels

        kernels.backward(*tensors, grad_parameters)
        return grad_residual, grad_x, grad_parameters
    codes = _native.DTYPE_CODES
    shape = (total.numel() // channels, channels, 0.0)
    types = (codes[x_dtype], codes[total.dtype], codes[weight.dtype])
    parts = grad_parameters
    if backend == "cuda":
        assert _native.core is not None
        count = _native.core.cuda_add_layer_norm_parts(shape, types)
        parts = grad_parameters.new_empty(count, 2, channels)
    addresses = [_native.address(t) for t in (*tensors, parts)]
    _native.call("add_layer_norm_backward", total, *addresses, shape, types)
    if parts is not grad_parameters:
        torch.sum(parts, 0, out=grad_parameters)
    return grad_residual, grad_x, grad_parameters


def _run_registered_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same, with an empty tensor where the gradient of x is that of residual: what an op
    returns is no two names of one tensor."""
    grad_residual, grad_x, grad_parameters = _run_backward(*arguments)
    if grad_x is None:
        grad_x = grad_residual.new_empty(0)
    return grad_residual, grad_x, grad_parameters


def _moments(total: Tensor) -> Tensor:
    return total.new_empty(2, *total.shape[:-1], dtype=statistics_dtype(total))


def _outputs(x: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    total = residual.new_empty(residual.shape)
    return total, torch.empty_like(total), _moments(residual)


def _gradients(total: Tensor, x_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    own = total.shape if x_dtype != total.dtype else (0,)
    return (
        total.new_empty(total.shape),
        total.new_empty(own, dtype=x_dtype),
        total.new_empty(2, total.shape[-1], dtype=statistics_dtype(total)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weight, _, _, ctx.backend = inputs
    ctx.x_dtype = x.dtype
    ctx.set_materialize_grads(False)  # the sum of the last block has none
    ctx.save_for_backward(output[0], output[2], weight)


def _backward(
    ctx: Any, grad_sum: Tensor | None, grad_norm: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_norm is None:
        grad_x = None if grad_sum is None else grad_sum.to(ctx.x_dtype)
        return grad_x, grad_sum, None, None, None, None
    total, moments, weight = ctx.saved_tensors
    tensors = (grad_sum, grad_norm, total, moments, weight)
    run = _run_backward if is_plain(*tensors) else _op_backward
    grad_residual, grad_x, parameters = run(*tensors, ctx.x_dtype, ctx.backend)
    if ctx.x_dtype is total.dtype:
        grad_x = grad_residual
    grad_weight, grad_bias = parameters.to(weight.dtype).unbind()
    return grad_x, grad_residual, grad_weight, grad_bias, None, None


_op_backward = register(
    "add_layer_norm_backward",
    "(Tensor? grad_sum, Tensor grad_norm, Tensor sum, Tensor moments, Tensor weight, "
    "ScalarType x_dtype, str backend) -> (Tensor, Tensor, Tensor)",
    _run_registered_backward,
    lambda grad_sum, grad_norm, total, moments, weight, x_dtype, *_: _gradients(total, x_dtype),
    autograd=no_second_derivative("add_layer_norm"),
    autocast=False,
)
_op = register(
    "add_layer_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _run_with_moments,
    _outputs,
    autograd=(_setup_context, _backward),
    autocast=False,
)


def _objection(backend: str, x: Tensor, residual: Tensor, *_: Any, **__: Any) -> str | None:
    if backend == "cpu":
        return None
    if residual.dtype == torch.float64:
        return "it does not compute float64"
    if torch.compiler.is_exporting():  # or sizes would get an upper bound
        return None
    channels = x.shape[-1]
    if backend == "triton" and channels > TRITON_CHANNELS:
        return f"it takes at most {TRITON_CHANNELS} channels, and this has {channels}"
    rows = x.numel() // max(channels, 1)
    if rows >= 2**31:
        return f"it takes fewer than {2**31} rows, and this has {rows}"
    return None


def _automatic(x: Tensor) -> tuple[str, ...]:
    """On a GPU nothing was measured yet; CUDA C++ stands first."""
    return {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}.get(device_type(x), ())


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The tokens of ViTPose-B."""
    x = torch.empty(8, 192, 768, device=device, dtype=dtype)
    weight = torch.empty(768, device=device)
    return (x, torch.empty_like(x), weight, torch.empty_like(weight)), {}


register_backends(
    OpSpec(
        name="add_layer_norm",
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
