"""A chain of dilated 3x3 convolutions, each map written straight into the result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kernelpose import _native
from kernelpose.backend import OpSpec, choose
from kernelpose.backend import register as register_backends
from kernelpose.ops._maps import check_maps, memory_format, statistics_dtype
from kernelpose.ops._register import autocast, is_plain, no_second_derivative, register
from kernelpose.reference.dilated_pyramid import dilated_pyramid as reference


def dilated_pyramid(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    dilations: Sequence[int],
    stride: int = 1,
    mode: str = "concat",
    activation: str = "relu",
    backend: str | None = None,
) -> Tensor:
    """f_1, ..., f_n, or their sum, where f_i = act(w_i * f_{i-1} + b_i), f_0 = x, and * is a 3x3
    convolution with a dilation of its own and as many zeros around: the hybrid-dilated pyramids of
    HRPVT, their batch norms folded into weights and biases.

    Args:
        x: (B, C, H, W) in either memory format, contiguous or channels_last, which the result and
            the gradient keep; anything else is copied once. float32, float16, bfloat16 (or float64
            on a CPU).
        weights: (C_1, C, 3, 3), (C_2, C_1, 3, 3), ... biases: (C_1,), (C_2,), ... Of any
            floating-point dtype; GPUs take weights in the dtype of x.
        dilations: of each convolution, in pixels.
        stride: of the first convolution; the others have 1.
        mode: "concat" for all maps, one after the other along the channels; "sum" for f_1 + ... +
            f_n, which have one width then.
        activation: "relu" or "none".
        backend: "cuda", "triton", "cpu" or "eager"; None chooses, see `kernelpose.backend`.

    On a CPU layers of 32 channels or more may go by Winograd's F(2x2, 3x3), in which a number that
    is not finite reaches its neighbours in a tile as well.

    Returns:
        (B, C_1 + ... + C_n, h, w), or (B, C_1, h, w), with h = ceil(H / stride); sums are taken in
        float32 (float64 for float64). Under autocast x is cast to autocast's dtype. The backward
        pass is deterministic; a second derivative needs "eager".

    Raises:
        ValueError: a shape or an option does not fit. TypeError: not a floating-point tensor.
        BackendError: the backend asked for cannot run this.
    """
    _check(x, weights, biases, dilations, stride, mode, activation)
    x = autocast(x)
    options = {"dilations": dilations, "stride": stride, "mode": mode, "activation": activation}
    chosen = choose("dilated_pyramid", backend, x, weights, biases, **options)
    if chosen == "eager":
        return reference(x, weights, biases, dilations, stride, mode, activation)
    dtype = statistics_dtype(x)
    if any(p.dtype != dtype for p in (*weights, *biases)):
        weights, biases = ([p.to(dtype) for p in given] for given in (weights, biases))
    tensors = (x, *weights, *biases)
    plain = is_plain(*tensors)
    run: Callable[..., tuple[Tensor, Tensor]] = _run_forward if plain else _op
    # The backward pass needs all maps, which the sum does not hold.
    keep = not plain and mode == "sum" and torch.is_grad_enabled()
    keep = keep and any(t.requires_grad for t in tensors)
    arguments = list(weights), list(biases), list(dilations), stride, mode, activation
    return run(x, *arguments, keep, chosen)[0]


def _check(
    x: Tensor, weights: Any, biases: Any, dilations: Any, stride: Any, mode: Any, activation: Any
) -> None:
    check_maps("x", x)
    if 0 in x.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected a channel and a pixel at least.")
    for name, given in (("weights", weights), ("biases", biases), ("dilations", dilations)):
        if not isinstance(given, list | tuple):
            raise TypeError(f"{name} is {type(given).__name__}; expected a list.")
    if not weights:
        raise ValueError("weights is empty; expected a convolution at least.")
    for name, given in (("biases", biases), ("dilations", dilations)):
        if len(given) != len(weights):
            raise ValueError(
                f"{name} has length {len(given)}; expected {len(weights)}, as weights."
            )
    for name, number in (
        ("stride", stride),
        *((f"dilations[{i}]", d) for i, d in enumerate(dilations)),
    ):
        if not isinstance(number, int):
            raise TypeError(f"{name} is {number!r}; expected an integer.")
        if number < 1:
            raise ValueError(f"{name} is {number}; expected 1 or more.")
    if mode not in ("concat", "sum"):
        raise ValueError(f"mode is {mode!r}; expected 'concat' or 'sum'.")
    if activation not in ("relu", "none"):
        raise ValueError(f"activation is {activation!r}; expected 'relu' or 'none'.")
    channels = x.shape[1]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        for name, tensor in ((f"weights[{i}]", weight), (f"biases[{i}]", bias)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} is {type(tensor).__name__}; expected a tensor.")
            if not tensor.is_floating_point():
                raise TypeError(f"{name} is {tensor.dtype}; expected a floating-point tensor.")
            if tensor.device != x.device:
                raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, as x.")
        width = weight.shape[0] if weight.ndim else 0
        if weight.shape != (width, channels, 3, 3) or width == 0:
            expected = f"(C, {channels}, 3, 3)"
            raise ValueError(f"weights[{i}] has shape {tuple(weight.shape)}; expected {expected}.")
        if bias.shape != (width,):
            raise ValueError(f"biases[{i}] has shape {tuple(bias.shape)}; expected ({width},).")
        if mode == "sum" and width != weights[0].shape[0]:
            raise ValueError(
                f"weights[{i}] has {width} outputs; expected {weights[0].shape[0]}, as weights[0], "
                "for mode 'sum'."
            )
        channels = width


def _run_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    mode: str,
    activation: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out, maps): maps are f_1, ..., f_n where `keep` asks for them, which only the sum needs."""
    x = x.contiguous(memory_format=memory_format(x))
    weights, biases = ([p.contiguous() for p in given] for given in (weights, biases))
    out, maps = _outputs(x, weights, biases, dilations, stride, mode, activation, keep)
    if not out.numel():
        return out, maps
    relu, total = activation == "relu", mode == "sum"
    every = maps  # where the kernels of a GPU write what the next layer reads
    if total and not keep and backend != "cpu":
        every = _outputs(x, weights, biases, dilations, stride, mode, activation, True)[1]
    if backend == "triton":
        from kernelpose.triton_kernels import dilated_pyramid as kernels

        maps_of, sum_of = (every, out) if total else (out, None)
        reach = _within(x, dilations)
        kernels.forward(x, weights, biases, reach, stride, relu, maps_of, sum_of, keep)
        return out, maps
    layers, shape = _native_arguments(x, weights, biases, dilations, stride, mode, activation)
    results = [_native.address(out), _native.address(every if every.numel() else None)]
    if backend == "cuda":
        assert _native.core is not None
        packed = x.new_empty(_native.core.cuda_dilated_pyramid_workspace(layers, shape))
        results += [keep, _native.address(packed)]
    code = _native.DTYPE_CODES[x.dtype]
    _native.call("dilated_pyramid_forward", x, _native.address(x), layers, *results, shape, code)
    return out, maps


def _within(x: Tensor, dilations: Sequence[int]) -> list[int]:
    """The dilations; those beyond the map are all alike."""
    return [min(dilation, max(x.shape[2:])) for dilation in dilations]


def _native_arguments(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    mode: str,
    activation: str,
) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """The layers and the shape, as csrc/bindings/dilated_pyramid.cpp takes them."""
    layers: list[tuple[int, ...]] = [
        (_native.address(w), _native.address(b), w.shape[0], d)
        for w, b, d in zip(weights, biases, _within(x, dilations), strict=True)
    ]
    flags = not x.is_contiguous(), stride, activation == "relu", mode == "sum"
    return layers, (*x.shape, *flags)


def _run_backward(
    grad_out: Tensor,
    x: Tensor,
    maps: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    mode: str,
    activation: str,
    of_x: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of x (empty unless `of_x`), of the weights and of the biases."""
    layout = memory_format(x)
    grad_out, x, maps = (t.contiguous(memory_format=layout) for t in (grad_out, x, maps))
    weights = [w.contiguous() for w in weights]
    grad_x, of_weights, of_biases = _gradients(
        grad_out, x, maps, weights, dilations, stride, mode, activation, of_x
    )
    if not x.numel():
        return grad_x, [g.zero_() for g in of_weights], [g.zero_() for g in of_biases]
    options = dilations, stride, mode, activation
    if backend == "cpu":
        layers, shape = _native_arguments(x, weights, weights, *options)
        results = [[_native.address(g) for g in given] for given in (of_weights, of_biases)]
        addresses = [_native.address(t) for t in (grad_out, x, maps)]
        to_x = _native.address(grad_x if of_x else None)
        code = _native.DTYPE_CODES[x.dtype]
        _native.call("dilated_pyramid_backward", x, *addresses, layers, to_x, *results, shape, code)
    else:
        gradients = (grad_x if of_x else None), of_weights, of_biases
        _layer_by_layer(grad_out, x, maps, weights, *options, *gradients, backend)
    return grad_x, of_weights, of_biases


def _layer_by_layer(
    grad_out: Tensor,
    x: Tensor,
    maps: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    mode: str,
    activation: str,
    grad_x: Tensor | None,
    of_weights: Sequence[Tensor],
    of_biases: Sequence[Tensor],
    backend: str,
) -> None:
    """Fill the gradients: our kernel up to a layer's activation, PyTorch's convolution below it."""
    end, carry = maps.shape[1], None
    for i in reversed(range(len(weights))):
        width = weights[i].shape[0]
        first = end - width
        grad = _before_activation(
            grad_out, maps, carry, first, width, mode == "concat", activation == "relu", backend
        )
        before = maps[:, first - weights[i - 1].shape[0] : first] if i else x
        steps, reach = [1 if i else stride] * 2, [dilations[i]] * 2
        with _deterministic_cudnn():
            carry, of_weight, of_bias = torch.ops.aten.convolution_backward(
                grad, before, weights[i].to(x.dtype), [width], steps, reach, reach, False,
                [0, 0], 1, [i > 0 or grad_x is not None, True, True],
            )  # fmt: skip
        of_weights[i].copy_(of_weight)
        of_biases[i].copy_(of_bias)
        end = first
    if grad_x is not None:
        assert carry is not None
        grad_x.copy_(carry)


@contextlib.contextmanager
def _deterministic_cudnn() -> Iterator[None]:
    """Around convolutions whose sums else come in any order."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _before_activation(
    grad_out: Tensor,
    maps: Tensor,
    carry: Tensor | None,
    first: int,
    width: int,
    concat: bool,
    relu: bool,
    backend: str,
) -> Tensor:
    """The gradient of the `width` channels from `first` on of maps before their activation:
    grad_out + carry, 0 where maps <= 0. Both are dense; of a concatenation grad_out is as wide."""
    layout = memory_format(maps)
    batch, channels, *size = maps.shape
    pixels = size[0] * size[1]
    grad = torch.empty(
        (batch, width, *size), dtype=maps.dtype, device=maps.device, memory_format=layout
    )
    carry = carry if carry is None else carry.contiguous(memory_format=layout)
    # A row is a pixel in channels_last, else an image.
    row, rows = (1, batch * pixels) if layout == torch.channels_last else (pixels, batch)
    table = (rows, width * row, grad_out.shape[1] * row, channels * row)
    own = maps[:, first:] if relu else None
    part = grad_out[:, first:] if concat else grad_out
    if backend == "triton":
        from kernelpose.triton_kernels import dilated_pyramid as kernels

        kernels.mask(part, carry, own, grad, table)
        return grad
    addresses = [_native.address(t) for t in (part, carry, own, grad)]
    _native.call("dilated_pyramid_mask", grad, *addresses, table, _native.DTYPE_CODES[grad.dtype])
    return grad


def _outputs(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    mode: str,
    activation: str,
    keep: bool,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    layout = memory_format(x)
    batch, height, width = x.shape[0], *x.shape[2:]
    pixels = ((height - 1) // stride + 1, (width - 1) // stride + 1)
    channels = sum(w.shape[0] for w in weights)

    def empty(channels: int) -> Tensor:
        shape = (batch, channels, *pixels)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)

    out = empty(channels if mode == "concat" else weights[0].shape[0])
    return out, empty(channels) if keep else x.new_empty(0)


def _gradients(
    grad_out: Tensor,
    x: Tensor,
    maps: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    mode: str,
    activation: str,
    of_x: bool,
    *_: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad_x = torch.empty_like(x, memory_format=memory_format(x)) if of_x else x.new_empty(0)
    of_weights = [w.new_empty(w.shape) for w in weights]
    return grad_x, of_weights, [w.new_empty(w.shape[0]) for w in weights]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, _, dilations, stride, mode, activation, _, backend = inputs
    ctx.arguments = dilations, stride, mode, activation
    ctx.backend = backend
    ctx.save_for_backward(x, output[0] if mode == "concat" else output[1], *weights)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, maps, *weights = ctx.saved_tensors
    plain = is_plain(grad_out, x, maps, *weights)
    run: Callable[..., Any] = _run_backward if plain else _op_backward
    of_x = ctx.needs_input_grad[0]
    grad_x, *gradients = run(grad_out, x, maps, weights, *ctx.arguments, of_x, ctx.backend)
    return grad_x if of_x else None, *gradients, *[None] * 6


CPU_CHANNELS = 192  # so many are faster one convolution after the other
_OPTIONS = "int[] dilations, int stride, str mode, str activation"
_op_backward = register(
    "dilated_pyramid_backward",
    f"(Tensor grad_out, Tensor x, Tensor maps, Tensor[] weights, {_OPTIONS}, bool of_x, "
    "str backend) -> (Tensor, Tensor[], Tensor[])",
    _run_backward,
    _gradients,
    autograd=no_second_derivative("dilated_pyramid"),
    autocast=False,
)
_op = register(
    "dilated_pyramid",
    f"(Tensor x, Tensor[] weights, Tensor[] biases, {_OPTIONS}, bool keep, str backend) "
    "-> (Tensor, Tensor)",
    _run_forward,
    _outputs,
    autograd=(_setup_context, _backward),
)


def _objection(
    backend: str, x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any
) -> str | None:
    if backend == "cpu" or torch.compiler.is_exporting():  # or sizes would get an upper bound
        return None
    batch, channels, height, width = x.shape
    channels = max(channels, sum(w.shape[0] for w in weights))
    limits = [("elements of an image's maps", channels * height * width)]
    # A block has 4 rows of 16 pixels at least.
    tiles = batch * ((height + 3) // 4) * ((width + 15) // 16)
    limits.append(("tiles of all images", tiles))
    for what, count in limits:
        if count >= 2**31:
            return f"it takes fewer than {2**31} {what}, and this has {count}"
    return None


def _automatic(x: Tensor) -> tuple[str, ...]:
    """On a GPU nothing was measured yet; CUDA C++ stands first.

    On a CPU (one thread, AVX-512, batch 1 and 8) C++ took, of eager's time forward and backward,
    0.3 to 0.7 and 0.4 to 0.9 on HRPVT's pyramids of 16 to 64 channels, 0.7 to 0.8 and 0.9 to 1.1
    with 160, 0.8 to 1.3 and 0.9 to 1.3 with 256 on 16x12, whose weights outgrow the caches.
    """
    on_cpu = ("cpu",) if x.shape[1] < CPU_CHANNELS else ()
    return {"cuda": ("cuda", "triton"), "cpu": on_cpu}.get(x.device.type, ())


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """HRPVT's stem: six maps of 16 channels at half resolution."""
    x = torch.empty(8, 3, 256, 192, device=device, dtype=dtype)
    weights = [torch.empty(16, c, 3, 3, device=device) for c in (3, 16, 16, 16, 16, 16)]
    biases = [torch.empty(16, device=device)] * 6
    return (x, weights, biases), {"dilations": (1, 2, 5, 1, 2, 5), "stride": 2}


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

register_backends(
    OpSpec(
        name="dilated_pyramid",
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
