"""Attention of groups of channels in a cascade, to keys and values of a reduced map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelpose import _native
from kernelpose.backend import OpSpec, choose
from kernelpose.backend import register as register_backends
from kernelpose.ops._register import autocast, is_plain, no_autocast, register
from kernelpose.reference.cascaded_attention import cascaded_attention as reference

MAX_GROUP_WIDTH = 128


def cascaded_attention(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    kv_weight: Tensor,
    kv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    num_heads: int,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """The attention of HEViTPose (arXiv 2311.13615, CGSR-MHA), but for its last projection.

    The C channels are G groups of d. Each adds what the one before it found to its own channels,
    u_i = x_i + o_(i-1), and every place of u_i attends to a map s_i that a depthwise convolution of
    kernel and stride R makes of it:

        q = W_q norm(u_i),  (k, v) = W_kv norm(s_i),  o_i = LN(W_out softmax(q kᵀ / sqrt(e)) v)

    with e = d / num_heads, the softmax head by head, norm a LayerNorm without weight and bias, and
    a bias to every product. Neither queries nor scores reach memory.

    Args:
        x: (B, H, W, C), H and W multiples of R; float32, float16, bfloat16 (or float64 on a CPU). A
            non-contiguous tensor is copied once, here and below.
        reduce_weight, reduce_bias: (C, 1, R, R) and (C,), the convolution.
        q_weight, q_bias: (G, d, d) and (G, d). A LayerNorm's weight and bias are to be folded into
            the linears that follow it.
        kv_weight, kv_bias: (G, 2d, d) and (G, 2d), keys first.
        out_weight, out_bias: (G, d, d) and (G, d).
        norm_weight, norm_bias: (G, d), of the LayerNorm LN.
        num_heads: heads of a group; it divides d.
        eps: of all norms.
        backend: "cuda", "triton", "cpu" or "eager"; None chooses, see `kernelpose.backend`. Only
            the last has a gradient: where one is wanted, None chooses "eager".

    Returns:
        (B, H, W, C) in x's dtype, [o_1 ... o_G]. Softmax, norms and sums are float32 (float64 for
        float64); u_i and o_i are rounded to x's dtype. Under autocast all tensors are cast to its
        dtype.

    Raises:
        ValueError: a shape or size does not fit. TypeError: not a floating-point tensor, or two
        dtypes. BackendError: the backend asked for cannot run this.
    """
    tensors = {
        "x": x,
        "reduce_weight": reduce_weight,
        "reduce_bias": reduce_bias,
        "q_weight": q_weight,
        "q_bias": q_bias,
        "kv_weight": kv_weight,
        "kv_bias": kv_bias,
        "out_weight": out_weight,
        "out_bias": out_bias,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
    }
    _check(tensors, num_heads, eps)
    inputs = [autocast(t) for t in tensors.values()]
    for name, tensor in zip(tensors, inputs, strict=True):
        if tensor.dtype != inputs[0].dtype:
            raise TypeError(f"{name} is {tensor.dtype}; expected {inputs[0].dtype}, as x.")
    chosen = choose("cascaded_attention", backend, *inputs, num_heads=num_heads, eps=eps)
    if chosen == "eager":
        with no_autocast(inputs[0]):
            return reference(*inputs, num_heads=num_heads, eps=eps)
    run = _run if is_plain(*inputs) else _op
    out: Tensor = run(*inputs, num_heads, eps, chosen)
    return out


def _check(tensors: dict[str, Tensor], num_heads: int, eps: float) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; expected a tensor.")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; expected a floating-point tensor.")
    x, reduce, q = tensors["x"], tensors["reduce_weight"], tensors["q_weight"]
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected (B, H, W, C), H, W and C at least 1."
        )
    channels = x.shape[3]
    if reduce.ndim != 4 or reduce.shape[:2] != (channels, 1) or reduce.shape[2] != reduce.shape[3]:
        raise ValueError(
            f"reduce_weight has shape {tuple(reduce.shape)}; expected ({channels}, 1, R, R), as x "
            f"has shape {tuple(x.shape)}."
        )
    ratio = reduce.shape[3]
    if ratio == 0 or x.shape[1] % ratio or x.shape[2] % ratio:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected (B, H, W, C), H and W multiples of {ratio}, "
            "the kernel of reduce_weight."
        )
    if q.ndim != 3 or q.shape[1] != q.shape[2] or q.shape[0] * q.shape[1] != channels:
        raise ValueError(
            f"q_weight has shape {tuple(q.shape)}; expected (G, d, d), G d = {channels}, as x has "
            f"shape {tuple(x.shape)}."
        )
    groups, width = q.shape[:2]
    shapes = {
        "reduce_bias": (channels,),
        "q_bias": (groups, width),
        "kv_weight": (groups, 2 * width, width),
        "kv_bias": (groups, 2 * width),
        "out_weight": (groups, width, width),
        "out_bias": (groups, width),
        "norm_weight": (groups, width),
        "norm_bias": (groups, width),
    }
    for name, expected in shapes.items():
        if tensors[name].shape != expected:
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)}; expected {expected}, as x has "
                f"shape {tuple(x.shape)} and q_weight {tuple(q.shape)}."
            )
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, as x.")
    if not isinstance(num_heads, int) or num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads is {num_heads!r}; expected a divisor of d, which is {width}.")
    if not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"eps is {eps!r}; expected a number of at least 0.")


def _run(x: Tensor, *rest: Any) -> Tensor:
    *parameters, num_heads, eps, backend = rest
    x, *parameters = (t.contiguous() for t in (x, *parameters))
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    if backend == "triton":
        from kernelpose.triton_kernels import cascaded_attention as kernels

        kernels.forward((x, *parameters), out, num_heads, eps)
        return out
    groups, width = parameters[3].shape
    shape = (*x.shape[:3], groups, width, num_heads, parameters[0].shape[3], eps)
    code = _native.DTYPE_CODES[x.dtype]
    tensors, memory = [x, *parameters], []
    if x.is_cuda:  # its kernels read 16 bytes at once
        tensors = [t.clone() if t.data_ptr() % 16 else t for t in tensors]
        memory = [_native.workspace("cascaded_attention", x, shape, code)]
    addresses = map(_native.address, (*tensors, out, *memory))
    _native.call("cascaded_attention_forward", x, *addresses, shape, code)
    return out


_op = register(
    "cascaded_attention",
    "(Tensor x, Tensor reduce_weight, Tensor reduce_bias, Tensor q_weight, Tensor q_bias, "
    "Tensor kv_weight, Tensor kv_bias, Tensor out_weight, Tensor out_bias, Tensor norm_weight, "
    "Tensor norm_bias, int num_heads, float eps, str backend) -> Tensor",
    _run,
    lambda x, *_: x.new_empty(x.shape),
    autocast=11,
)


def _objection(backend: str, *inputs: Tensor, num_heads: int, **_: Any) -> str | None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return "it has no gradient, and an input requires one"
    x, q_weight = inputs[0], inputs[3]
    if q_weight.shape[1] > MAX_GROUP_WIDTH:
        return f"its groups have at most {MAX_GROUP_WIDTH} channels, and these {q_weight.shape[1]}"
    if backend == "cuda" and q_weight.shape[1] % 8:
        return f"its groups have a multiple of 8 channels, and these {q_weight.shape[1]}"
    head = q_weight.shape[1] // num_heads
    if backend == "triton" and x.dtype == torch.float32 and head > 64:  # out of registers
        return f"its heads have at most 64 channels in float32, and these {head}"
    if torch.compiler.is_exporting():  # or its dynamic sizes would get upper bounds
        return None
    # (what, how many, below which number)
    limits = [
        ("channels", x.shape[3], 2**24),
        ("places of a map", x.shape[1] * x.shape[2], 2**30),
    ]
    if backend in ("cuda", "triton"):  # of a grid's 2**31 blocks, and numbers of 32 bits
        limits.append(("places of all maps", x.shape[0] * x.shape[1] * x.shape[2], 2**31))
        limits.append(("places that become one", inputs[1].shape[3] ** 2, 2**16))
    for what, count, limit in limits:
        if count >= limit:
            return f"it takes fewer than {limit} {what}, and this has {count}"
    return None


def _automatic(x: Tensor) -> tuple[str, ...]:
    """On a GPU nothing was measured yet; CUDA C++ stands first."""
    return {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}.get(x.device.type, ())


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first stage of HEViTPose-B on 256 x 192 pixels."""
    groups, width, ratio = 4, 40, 8
    x = torch.empty(1, 64, 48, groups * width, device=device, dtype=dtype)
    square, row = x.new_empty(groups, width, width), x.new_empty(groups, width)
    double = x.new_empty(groups, 2 * width, width), x.new_empty(groups, 2 * width)
    reduce = x.new_empty(groups * width, 1, ratio, ratio), x.new_empty(groups * width)
    return (x, *reduce, square, row, *double, square, row, row, row), {"num_heads": 2}


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

register_backends(
    OpSpec(
        name="cascaded_attention",
        dtypes={
            "cuda": _FLOATS,
            "triton": _FLOATS,
            "cpu": (*_FLOATS, torch.float64),
            "eager": (*_FLOATS, torch.float64),
        },
        directions="fwd",
        automatic=_automatic,
        objection=_objection,
        example=_example,
    )
)
