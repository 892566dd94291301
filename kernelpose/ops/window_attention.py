"""Windowed multi-head self-attention straight from the packed projection of a token map."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelpose import _native
from kernelpose.backend import OpSpec, choose
from kernelpose.backend import register as register_backends
from kernelpose.ops._register import autocast, is_plain, no_second_derivative, register
from kernelpose.reference.window_attention import window_attention as reference

Pair = tuple[int, int]

MAX_HEAD_DIM = 128


class Options(NamedTuple):
    """The arguments that are not tensors, checked and complete, in the order of the schema."""

    num_heads: int
    window: Pair
    shift: Pair
    partition: str
    pooled: bool
    scale: float

    def extent(self, qkv: Tensor) -> Pair:
        """(rows, columns) of the largest group of tokens that there can be."""
        if self.partition == "window":
            return self.window
        return -(-qkv.shape[1] // self.window[0]), -(-qkv.shape[2] // self.window[1])


def window_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    window: Pair | None = None,
    shift: Pair = (0, 0),
    partition: str = "window",
    bias_table: Tensor | None = None,
    pooled: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + bias) v among the tokens of each group of the map, per head.

    One fused pass: no roll, partition, padding or permutation of the map is ever copied.

    Args:
        qkv: (B, H, W, 3C), as the projection leaves it, channels ordered (q, k, v) × heads × head
            width; float32, float16, bfloat16 (or float64 on a CPU). Head width C / num_heads up to
            128. A non-contiguous map is copied once.
        num_heads: heads; it divides C.
        window: (height, width) of a window in tokens; None is full attention over the map.
        shift: cyclic shift (rows, columns), 0 <= shift < window; tokens that meet only through the
            roll do not see each other (Swin, arXiv 2103.14030).
        partition: "window", or "grid": strided groups, window being the patch size; tokens at the
            same place of each patch attend to each other (MobileViT, arXiv 2110.02178).
        bias_table: relative-position bias ((2h-1)(2w-1), heads), added to the scaled scores; h × w
            is the window (for "grid", the number of patches). Any float dtype; it has a gradient.
        pooled: each window also sees the mean key and the mean value of every window (ViTPose,
            arXiv 2204.12484); with a shift these are the rolled windows.
        scale: factor of the scores; None is head width ** -0.5.
        backend: "cuda", "triton", "cpu", "torch" (one call of scaled_dot_product_attention; full
            attention only) or "eager"; None chooses, see `kernelpose.backend`.

    Returns:
        (B, H, W, C) in qkv's dtype; softmax and sums are float32 (float64 for float64). Under
        autocast qkv is cast to its dtype. A map that the window does not tile behaves as if padded
        with keys that nobody can see. The backward pass of "cuda", "triton" and "cpu" is
        deterministic; a second derivative needs "eager".

    Raises:
        ValueError: a shape, size or name does not fit. TypeError: not a floating-point tensor.
        BackendError: the backend asked for cannot run this.
    """
    _check_first(qkv, scale)
    options = _complete(qkv, num_heads, window, shift, partition, pooled, scale)
    _check(qkv, bias_table, options)
    qkv = autocast(qkv)
    chosen = choose("window_attention", backend, qkv, *options, bias_table=bias_table)
    if chosen == "eager":
        return reference(qkv, bias_table, *options)
    if chosen == "torch":
        return _scaled_dot_product(qkv, options)
    if bias_table is not None:
        bias_table = bias_table.to(_statistics_dtype(qkv))
    run = _run_forward if is_plain(qkv, bias_table) else _op
    out: Tensor = run(qkv, bias_table, *options, chosen)[0]
    return out


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(isinstance(v, int | torch.SymInt) and v < 2**31 for v in value)
    )


def _check_first(qkv: Tensor, scale: float | None) -> None:
    """What has to hold before the options can be completed."""
    if not isinstance(qkv, Tensor):
        raise TypeError(f"qkv is {type(qkv).__name__}; expected a tensor.")
    if not qkv.is_floating_point():
        raise TypeError(f"qkv is {qkv.dtype}; expected a floating-point tensor.")
    if qkv.ndim != 4 or qkv.shape[-1] == 0 or 0 in qkv.shape[1:3]:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; expected (B, H, W, 3C), H, W, C >= 1.")
    if scale is not None and not isinstance(scale, int | float):
        raise TypeError(f"scale is {scale!r}; expected a number or None.")


def _complete(
    qkv: Tensor,
    num_heads: int,
    window: Pair | None = None,
    shift: Pair = (0, 0),
    partition: str = "window",
    pooled: bool = False,
    scale: float | None = None,
) -> Options:
    """The options that are meant for a map: None is filled in."""
    _, height, width, channels3 = qkv.shape
    if num_heads < 1 or channels3 % (3 * num_heads):
        raise ValueError(
            f"num_heads is {num_heads}; expected a divisor of C, where qkv has 3C = {channels3}."
        )
    if window is None:
        if partition == "grid":
            raise ValueError("window is None; expected the patch size (h, w) for partition='grid'.")
        window = (height, width)
    if scale is None:
        scale = (channels3 // (3 * num_heads)) ** -0.5
    return Options(num_heads, window, shift, partition, pooled, scale)


def _check(qkv: Tensor, bias_table: Tensor | None, options: Options) -> None:
    num_heads, window, shift, partition, *_ = options
    if partition not in ("window", "grid"):
        raise ValueError(f"partition is {partition!r}; expected 'window' or 'grid'.")
    if not _is_pair(window) or min(window) < 1:
        raise ValueError(f"window is {window}; expected (height, width), each 1 to 2**31 - 1.")
    if not _is_pair(shift) or not all(0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(f"shift is {shift}; expected 0 <= shift < window, and window is {window}.")
    if partition == "grid" and any(shift):
        raise ValueError(f"shift is {shift}; expected (0, 0) for partition='grid'.")
    if bias_table is not None:
        h, w = options.extent(qkv)
        expected = ((2 * h - 1) * (2 * w - 1), num_heads)
        if tuple(bias_table.shape) != expected:
            raise ValueError(
                f"bias_table has shape {tuple(bias_table.shape)}; expected {expected} for groups "
                f"of {h} x {w} tokens and {num_heads} heads."
            )
        if not bias_table.is_floating_point():
            raise TypeError(f"bias_table is {bias_table.dtype}; expected a floating-point tensor.")
        if bias_table.device != qkv.device:
            raise ValueError(
                f"bias_table is on {bias_table.device}; expected {qkv.device}, as qkv."
            )


def _statistics_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _scaled_dot_product(qkv: Tensor, options: Options) -> Tensor:
    packed = qkv.flatten(1, 2).unflatten(-1, (3, options.num_heads, -1))
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, scale=options.scale)
    return out.transpose(1, 2).reshape(*qkv.shape[:3], qkv.shape[3] // 3)


def _run_forward(qkv: Tensor, bias_table: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """(out, lse): lse (B, heads, H, W) is the log-sum-exp of each query's scores.

    arguments: the fields of `Options`, then the backend.
    """
    options, backend = Options(*arguments[:-1]), arguments[-1]
    qkv = qkv.contiguous()
    bias_table = None if bias_table is None else bias_table.contiguous()
    if backend == "triton" and qkv.numel():
        from kernelpose.triton_kernels import window_attention as kernels

        return kernels.forward(qkv, bias_table, *options)
    out, lse = _outputs(qkv, options.num_heads)
    if out.numel():
        shape, code = _native_shape(qkv, options), _native.DTYPE_CODES[qkv.dtype]
        memory = _native.workspace("window_attention_forward", qkv, shape, code)
        tensors = [qkv, bias_table, out, lse, *([memory] if qkv.is_cuda else [])]
        addresses = [_native.address(t) for t in tensors]
        _native.call("window_attention_forward", qkv, *addresses, shape, code)
    return out, lse


def _run_backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """(gradient of qkv, gradient of bias_table); the second is empty where there is no table."""
    options, backend = Options(*arguments[:-1]), arguments[-1]
    grad_out, qkv, out, lse = (t.contiguous() for t in (grad_out, qkv, out, lse))
    bias_table = None if bias_table is None else bias_table.contiguous()
    if backend == "triton" and qkv.numel():
        from kernelpose.triton_kernels import window_attention as kernels

        grad_qkv, grad_bias = kernels.backward(grad_out, qkv, bias_table, out, lse, *options)
        return grad_qkv, lse.new_empty(0) if grad_bias is None else grad_bias
    grad_qkv, grad_bias = _gradients(qkv, bias_table, lse)
    if qkv.numel() == 0:
        return grad_qkv, grad_bias.zero_()
    shape, code = _native_shape(qkv, options), _native.DTYPE_CODES[qkv.dtype]
    bias_gradient = bias_table is not None
    memory = _native.workspace("window_attention_backward", qkv, shape, code, bias_gradient)
    tensors = [grad_out, qkv, bias_table, out, lse, grad_qkv, grad_bias if bias_gradient else None]
    addresses = [_native.address(t) for t in [*tensors, *([memory] if qkv.is_cuda else [])]]
    _native.call("window_attention_backward", qkv, *addresses, shape, code)
    return grad_qkv, grad_bias


def _native_shape(qkv: Tensor, options: Options) -> tuple[int | bool | float, ...]:
    """ShapeTuple of csrc/bindings/window_attention.cpp."""
    heads, window, shift, partition, pooled, scale = options
    batch, height, width, channels3 = qkv.shape
    sizes = (batch, height, width, heads, channels3 // (3 * heads))
    return (*sizes, *window, *shift, partition == "grid", pooled, scale)


def _outputs(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    batch, height, width, channels3 = qkv.shape
    out = qkv.new_empty(batch, height, width, channels3 // 3)
    lse = qkv.new_empty(batch, num_heads, height, width, dtype=_statistics_dtype(qkv))
    return out, lse


def _gradients(qkv: Tensor, bias_table: Tensor | None, lse: Tensor) -> tuple[Tensor, Tensor]:
    grad_bias = lse.new_empty(0) if bias_table is None else lse.new_empty(bias_table.shape)
    return qkv.new_empty(qkv.shape), grad_bias


_ARGUMENTS = (
    "int num_heads, SymInt[2] window, int[2] shift, str partition, bool pooled, float scale, "
    "str backend"
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias_table, *ctx.arguments = inputs
    ctx.save_for_backward(qkv, bias_table, *output)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, bias_table, out, lse = ctx.saved_tensors
    tensors = (grad_out, qkv, bias_table, out, lse)
    run = _run_backward if is_plain(*tensors) else _op_backward
    grad_qkv, grad_bias = run(*tensors, *ctx.arguments)
    return grad_qkv, None if bias_table is None else grad_bias, *(None for _ in ctx.arguments)


_op_backward = register(
    "window_attention_backward",
    "(Tensor grad_out, Tensor qkv, Tensor? bias_table, Tensor out, Tensor lse, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor)",
    _run_backward,
    lambda grad_out, qkv, bias_table, out, lse, *arguments: _gradients(qkv, bias_table, lse),
    autograd=no_second_derivative("window_attention"),
)
_op = register(
    "window_attention",
    f"(Tensor qkv, Tensor? bias_table, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _run_forward,
    lambda qkv, bias_table, num_heads, *arguments: _outputs(qkv, num_heads),
    autograd=(_setup_context, _backward),
)


def _objection(
    backend: str, qkv: Tensor, *given: Any, bias_table: Tensor | None = None, **named: Any
) -> str | None:
    options = _complete(qkv, *given, **named)
    if backend == "torch":
        full = options.partition == "window" and tuple(options.window) == tuple(qkv.shape[1:3])
        if not full or any(options.shift) or options.pooled or bias_table is not None:
            return "scaled_dot_product_attention does full attention without bias or pooled keys"
        return None
    head_dim = qkv.shape[-1] // (3 * options.num_heads)
    if head_dim > MAX_HEAD_DIM:
        return f"its head width is at most {MAX_HEAD_DIM}, and this is {head_dim}"
    if torch.compiler.is_exporting():  # or its dynamic sizes would get upper bounds
        return None
    return _too_large(backend, qkv, bias_table, options)


def _too_large(
    backend: str, qkv: Tensor, bias_table: Tensor | None, options: Options
) -> str | None:
    """Which number the kernels have no room for in an index or a grid.

    Shared memory has no part in this: their tiles have fixed sizes, whatever the map.
    """
    batch, height, width, channels3 = qkv.shape
    heads, window, extent = options.num_heads, options.window, options.extent(qkv)
    cell = min(extent[0], height) * min(extent[1], width)
    # (what, how many, below which number)
    limits = [
        ("channels", channels3, 2**31),
        ("tokens of an image", height * width, 2**31),
        ("positions along a map and a window", max(height + window[0], width + window[1]), 2**29),
    ]
    if bias_table is not None:
        limits.append(("numbers in bias_table", bias_table.numel(), 2**31))
    if backend in ("cuda", "triton"):
        # Of a grid's 2**31 blocks no kernel needs more than two for a token of an image and head.
        limits.append(("tokens of all images and heads", batch * heads * height * width, 2**30))
    if backend == "cuda":  # Tokens in csrc/cuda/window_attention_tiles.cuh divides by multiplying
        limits.append(("tokens of an image, times its width", height * width * width, 2**32))
    if backend == "triton":
        limits.append(("tokens of a group", cell, 2**22))  # place_of in cells.py divides in float32
        if options.pooled:
            limits.append(("slots of a padded window", extent[0] * extent[1], 2**30))
        if bias_table is not None:  # its gradient takes a number each, before they are summed
            pairs = heads * (extent[0] * extent[1]) ** 2
            limits.append(("pairs of tokens with a bias, of all heads", pairs, 2**31))
    for what, count, limit in limits:
        if count >= limit:
            return f"it takes fewer than {limit} {what}, and this has {count}"
    return None


def _automatic(qkv: Tensor) -> tuple[str, ...]:
    """Order of the backends; only full attention has `torch` (SDPA) in question.

    CPU, measured on full attention over 48 to 768 tokens with one and two threads (README): in
    float32 ours takes 0.66 to 0.9 of SDPA's time forward and 0.5 to 0.9 backward. In the half
    types, where SDPA has the matrix units, ours takes 0.6 to 2.3 of its time forward and 0.1 to 1.0
    backward: ours to train, SDPA to infer. GPU: nothing was measured yet, so SDPA stands first.
    """
    if qkv.device.type == "cuda":
        return ("torch", "cuda", "triton")
    if qkv.device.type != "cpu":
        return ()
    trains = torch.is_grad_enabled() and qkv.requires_grad
    return ("cpu", "torch") if qkv.dtype == torch.float32 or trains else ("torch", "cpu")


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """ViTPose-B with shifted windows on 1/8 features."""
    qkv = torch.empty(1, 32, 24, 3 * 768, device=device, dtype=dtype)
    return (qkv,), {"num_heads": 12, "window": (8, 8), "shift": (4, 4)}


_HALVES = (torch.float16, torch.bfloat16)

register_backends(
    OpSpec(
        name="window_attention",
        dtypes={
            "cuda": (torch.float32, *_HALVES),
            "triton": (torch.float32, *_HALVES),
            "cpu": (torch.float32, *_HALVES, torch.float64),
            "torch": (torch.float32, *_HALVES, torch.float64),
            "eager": (torch.float32, *_HALVES, torch.float64),
        },
        directions="fwd+bwd",
        automatic=_automatic,
        objection=_objection,
        example=_example,
    )
)
