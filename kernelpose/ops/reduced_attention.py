"""Attention of a map's queries to the keys and values of a smaller map."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelpose import _native
from kernelpose.backend import OpSpec, choose, device_type
from kernelpose.backend import register as register_backends
from kernelpose.ops._register import autocast, is_plain, no_second_derivative, register
from kernelpose.reference.reduced_attention import reduced_attention as reference

MAX_HEAD_DIM = 128


def reduced_attention(
    q: Tensor,
    kv: Tensor,
    *,
    num_heads: int,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v, per head: the attention of PVT v2 (arXiv 2106.13797), whose keys
    come from a spatially reduced map.

    Straight from the two projections: no head is permuted, scores never reach memory.

    Args:
        q: (B, N, C), as Linear(C, C) leaves it, channels ordered heads × head width; float32,
            float16, bfloat16 (or float64 on a CPU). Head width C / num_heads up to 128. A
            non-contiguous tensor is copied once.
        kv: (B, M, 2C), M >= 1, as Linear(C, 2C) leaves it, channels ordered (k, v) × heads × head
            width.
        num_heads: heads; it divides C.
        scale: factor of the scores; None is head width ** -0.5.
        backend: "cuda", "triton", "cpu", "torch" (one call of scaled_dot_product_attention) or
            "eager"; None chooses, see `kernelpose.backend`.

    Returns:
        (B, N, C) in q's dtype; softmax and sums are float32 (float64 for float64). Under autocast
        q and kv are cast to its dtype. The backward pass of "cuda", "triton" and "cpu" is
        deterministic, and keeps a number a query and head beside q and kv; a second derivative
        needs "eager".

    Raises:
        ValueError: a shape or size does not fit. TypeError: not a floating-point tensor, or two
        dtypes. BackendError: the backend asked for cannot run this.
    """
    _check(q, kv, num_heads, scale)
    q, kv = autocast(q), autocast(kv)
    if kv.dtype != q.dtype:
        raise TypeError(f"kv is {kv.dtype}; expected {q.dtype}, as q.")
    chosen = choose("reduced_attention", backend, q, kv, num_heads=num_heads)
    if scale is None:
        scale = (q.shape[2] // num_heads) ** -0.5
    if chosen == "eager":
        return reference(q, kv, num_heads, scale)
    if chosen == "torch":
        return _scaled_dot_product(q, kv, num_heads, scale)
    if is_plain(q, kv):
        return _forward(q, kv, num_heads, scale, chosen, None)
    out: Tensor = _op(q, kv, num_heads, scale, chosen)[0]
    return out


def _check(q: Tensor, kv: Tensor, num_heads: int, scale: float | None) -> None:
    for name, tensor in (("q", q), ("kv", kv)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; expected a tensor.")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; expected a floating-point tensor.")
    if q.ndim != 3 or q.shape[2] == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected (B, N, C), C >= 1.")
    batch, _, channels = q.shape
    if kv.ndim != 3 or kv.shape[0] != batch or kv.shape[1] == 0 or kv.shape[2] != 2 * channels:
        raise ValueError(
            f"kv has shape {tuple(kv.shape)}; expected ({batch}, M, {2 * channels}), M >= 1, as q "
            f"has shape {tuple(q.shape)}."
        )
    if kv.device != q.device:
        raise ValueError(f"kv is on {kv.device}; expected {q.device}, as q.")
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads is {num_heads}; expected a divisor of C, which is {channels}.")
    if scale is not None and not isinstance(scale, int | float):
        raise TypeError(f"scale is {scale!r}; expected a number or None.")


def _scaled_dot_product(q: Tensor, kv: Tensor, num_heads: int, scale: float) -> Tensor:
    queries = q.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    k, v = kv.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(queries, k, v, scale=scale).transpose(1, 2).flatten(2)


def _forward(
    q: Tensor, kv: Tensor, num_heads: int, scale: float, backend: str, lse: Tensor | None
) -> Tensor:
    """out; writes log2 of the sum of exp of each query's scores to lse (B, heads, N), if given."""
    q, kv = q.contiguous(), kv.contiguous()
    out = torch.empty_like(q)
    if out.numel() == 0:
        return out
    if backend == "triton":
        from kernelpose.triton_kernels import reduced_attention as kernels

        kernels.forward(q, kv, out, lse, num_heads, scale)
        return out
    shape, code = _native_shape(q, kv, num_heads, scale), _native.DTYPE_CODES[q.dtype]
    addresses = [_native.address(t) for t in (q, kv, out, lse)]
    _native.call("reduced_attention_forward", q, *addresses, shape, code)
    return out


def _run_forward(
    q: Tensor, kv: Tensor, num_heads: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """(out, lse): see `_forward`."""
    lse = _statistics(q, num_heads)
    return _forward(q, kv, num_heads, scale, backend, lse), lse


def _run_backward(
    grad_out: Tensor,
    q: Tensor,
    kv: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and kv."""
    grad_out, q, kv, lse = (t.contiguous() for t in (grad_out, q, kv, lse))
    grad_q, grad_kv = torch.empty_like(q), torch.empty_like(kv)
    if q.numel() == 0:
        return grad_q, grad_kv.zero_()
    if backend == "triton":
        from kernelpose.triton_kernels import reduced_attention as kernels

        kernels.backward(grad_out, q, kv, lse, grad_q, grad_kv, num_heads, scale)
        return grad_q, grad_kv
    shape, code = _native_shape(q, kv, num_heads, scale), _native.DTYPE_CODES[q.dtype]
    memory = _native.workspace("reduced_attention_backward", q, shape, code)
    tensors = (grad_out, q, kv, lse, grad_q, grad_kv, *([memory] if q.is_cuda else []))
    _native.call("reduced_attention_backward", q, *map(_native.address, tensors), shape, code)
    return grad_q, grad_kv


def _native_shape(
    q: Tensor, kv: Tensor, num_heads: int, scale: float
) -> tuple[int, int, int, int, int, float]:
    """ShapeTuple of csrc/bindings/reduced_attention.cpp."""
    return (*q.shape[:2], kv.shape[1], num_heads, q.shape[2] // num_heads, scale)


def _statistics(q: Tensor, num_heads: int) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[0], num_heads, q.shape[1], dtype=dtype)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, kv, *ctx.arguments = inputs
    ctx.save_for_backward(q, kv, output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    tensors = (grad_out, *ctx.saved_tensors)
    run = _run_backward if is_plain(*tensors) else _op_backward
    return *run(*tensors, *ctx.arguments), None, None, None


_op_backward = register(
    "reduced_attention_backward",
    "(Tensor grad_out, Tensor q, Tensor kv, Tensor lse, int num_heads, float scale, str backend) "
    "-> (Tensor, Tensor)",
    _run_backward,
    lambda grad_out, q, kv, *_: (_dense(q), _dense(kv)),
    autograd=no_second_derivative("reduced_attention"),
    autocast=3,
)
_op = register(
    "reduced_attention",
    "(Tensor q, Tensor kv, int num_heads, float scale, str backend) -> (Tensor, Tensor)",
    _run_forward,
    lambda q, kv, num_heads, *_: (_dense(q), _statistics(q, num_heads)),
    autograd=(_setup_context, _backward),
    autocast=2,
)


def _objection(backend: str, q: Tensor, kv: Tensor, *, num_heads: int, **_: Any) -> str | None:
    if backend == "torch":
        return None
    batch, queries, channels = q.shape
    if channels // num_heads > MAX_HEAD_DIM:
        return f"its head width is at most {MAX_HEAD_DIM}, and this is {channels // num_heads}"
    if torch.compiler.is_exporting():  # or its dynamic sizes would get upper bounds
        return None
    # (what, how many, below which number)
    limits = [
        ("channels of kv", kv.shape[2], 2**31),
        ("queries of an image", queries, 2**30),
        ("keys of an image", kv.shape[1], 2**30),
    ]
    if backend in ("cuda", "triton"):  # of a grid's 2**31 blocks
        tokens = batch * num_heads * max(queries, kv.shape[1])
        limits.append(("tokens of all images and heads", tokens, 2**31))
    for what, count, limit in limits:
        if count >= limit:
            return f"it takes fewer than {limit} {what}, and this has {count}"
    return None


def _automatic(q: Tensor) -> tuple[str, ...]:
    """Order of the backends.

    CPU, measured on the stages of PVT v2 with one thread: in float32 ours takes 0.4 to 0.95 of the
    time of SDPA. In bfloat16, where SDPA has the matrix units, ours takes 0.8 to 1.25 of its time
    forward, and 0.1 to 0.9 backward: ours to train, SDPA to infer. GPU: nothing was measured yet,
    so SDPA stands first.
    """
    device = device_type(q)
    if device == "cuda":
        return ("torch", "cuda", "triton")
    if device != "cpu":
        return ()
    trains = torch.is_grad_enabled() and q.requires_grad
    return ("cpu", "torch") if q.dtype == torch.float32 or trains else ("torch", "cpu")


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first stage of HRPVT on 256 x 192 pixels."""
    q = torch.empty(1, 3072, 64, device=device, dtype=dtype)
    return (q, q.new_empty(1, 48, 128)), {"num_heads": 1}


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

register_backends(
    OpSpec(
        name="reduced_attention",
        dtypes={
            "cuda": _FLOATS,
            "triton": _FLOATS,
            "cpu": (*_FLOATS, torch.float64),
            "torch": (*_FLOATS, torch.float64),
            "eager": (*_FLOATS, torch.float64),
        },
        directions="fwd+bwd",
        automatic=_automatic,
        objection=_objection,
        example=_example,
    )
)
