"""Gaussian target heatmaps and their weighted squared error, the targets never in memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelpose import _native
from kernelpose.backend import OpSpec, choose
from kernelpose.backend import register as register_backends
from kernelpose.ops._register import is_plain, no_second_derivative, register
from kernelpose.reference.heatmap_loss import TARGET_CODECS, pixel_ratio
from kernelpose.reference.heatmap_loss import heatmap_loss as reference


class Options(NamedTuple):
    """The arguments that are not tensors, in the order of the schema."""

    input_size: tuple[int, int]
    sigma: float = 2.0
    codec: str = "udp"


def heatmap_loss(
    pred: Tensor,
    keypoints: Tensor,
    visible: Tensor,
    *,
    input_size: tuple[int, int],
    sigma: float = 2.0,
    codec: str = "udp",
    backend: str | None = None,
) -> Tensor:
    """Mean of weight · (pred - target)² over all elements, as mmpose's KeypointMSELoss.

    Targets and weights are those of `kernelpose.codecs.encode_udp` and `encode_msra`. A weight
    multiplies the squared error, as in mmpose 1.x; mmpose 0.x multiplied both maps by it, which
    squares it: the same where weights are 0 or 1. The mean counts every element, those of weight 0
    too. A joint of weight 0 takes no part otherwise: its map in `pred` may hold anything (mmpose
    makes NaN of a NaN there) and its gradient is 0.

    One pass: no target is ever in memory, only h + w exponentials a joint at a time.

    Args:
        pred: (B, K, h, w) heatmaps; float32, float16, bfloat16 (or float64 on a CPU). It has a
            gradient. A non-contiguous tensor is copied once.
        keypoints: (B, K, 2) x, y in pixels of the model's input, on pred's device; they may be NaN
            where they are not visible. Computed in float32 (float64 for float64), without gradient.
        visible: (B, K), of any dtype, without gradient; the weight of a joint, which below 0.5 has
            an empty target. A joint whose Gaussian lies outside the map has weight 0.
        input_size: (height, width) of the model's input.
        sigma: standard deviation in heatmap pixels, > 0.
        codec: "udp" (centres between pixels, a window of 3 sigma; `encode_udp`), "msra" (centres on
            pixels; `encode_msra`) or "unbiased" (`encode_msra(unbiased=True)`, no window).
        backend: "cuda", "triton", "cpu" or "eager"; None chooses, see `kernelpose.backend`.

    Returns:
        A scalar, float32 (float64 for float64), under autocast as well; NaN where pred has no
        elements, as the mean of nothing. Sums are taken in float32 in a fixed order; the same
        input gives the same bits. A second derivative needs "eager".

    Raises:
        ValueError: a shape, size, device or name does not fit. TypeError: a wrong type.
        BackendError: the backend asked for cannot run this.
    """
    options = Options(input_size, sigma, codec)
    _check(pred, keypoints, visible, options)
    chosen = choose("heatmap_loss", backend, pred, keypoints, visible, **options._asdict())
    if chosen == "eager":
        return reference(pred, keypoints, visible, *options)
    dtype = _statistics_dtype(pred)
    # Copied here where it must be, so that the backward pass saves the copy.
    pred, keypoints, visible = (
        pred.contiguous(),
        keypoints.detach().to(dtype),
        visible.detach().to(dtype),
    )
    run = _run_forward if is_plain(pred, keypoints, visible) else _op
    loss: Tensor = run(pred, keypoints, visible, *options, chosen)
    return loss


def _check(pred: Tensor, keypoints: Tensor, visible: Tensor, options: Options) -> None:
    for name, tensor in (("pred", pred), ("keypoints", keypoints), ("visible", visible)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; expected a tensor.")
        if name != "visible" and not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; expected a floating-point tensor.")
        if tensor.device != pred.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {pred.device}, as pred.")
    if pred.ndim != 4 or 0 in pred.shape[2:]:
        raise ValueError(f"pred has shape {tuple(pred.shape)}; expected (B, K, h, w), h, w >= 1.")
    joints = tuple(pred.shape[:2])
    for name, tensor, expected in (
        ("keypoints", keypoints, (*joints, 2)),
        ("visible", visible, joints),
    ):
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {expected} for pred of shape "
                f"{tuple(pred.shape)}."
            )
    size, sigma, codec = options
    if codec not in TARGET_CODECS:
        raise ValueError(f"codec is {codec!r}; expected one of {', '.join(TARGET_CODECS)}.")
    least = 2 if codec == "udp" else 1  # UDP measures from the first pixel to the last
    pair = isinstance(size, tuple | list | torch.Size) and len(size) == 2
    if not pair or not all(isinstance(s, int | torch.SymInt) and s >= least for s in size):
        raise ValueError(f"input_size is {size}; expected (height, width), each at least {least}.")
    if min(pred.shape[2:]) < least:
        raise ValueError(
            f"pred has maps of {pred.shape[2]} x {pred.shape[3]}; expected at least 2 x 2 for "
            "codec='udp'."
        )
    if not isinstance(sigma, int | float):
        raise TypeError(f"sigma is {sigma!r}; expected a number.")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma is {sigma}; expected a finite number above 0.")


def _statistics_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _run_forward(pred: Tensor, keypoints: Tensor, visible: Tensor, *arguments: Any) -> Tensor:
    """arguments: the fields of `Options`, then the backend."""
    options, backend = Options(*arguments[:-1]), arguments[-1]
    pred, keypoints, visible = (t.contiguous() for t in (pred, keypoints, visible))
    if pred.numel() == 0:
        return _output(pred).fill_(math.nan)
    if backend == "triton":
        from kernelpose.triton_kernels import heatmap_loss as kernels

        return kernels.forward(pred, keypoints, visible, *_parameters(pred, options))
    loss, shape = _output(pred), _native_shape(pred, options)
    memory = _native.workspace("heatmap_loss_forward", pred, shape)
    tensors = [pred, keypoints, visible, loss, *([memory] if pred.is_cuda else [])]
    addresses = [_native.address(t) for t in tensors]
    _native.call("heatmap_loss_forward", pred, *addresses, shape, _native.DTYPE_CODES[pred.dtype])
    return loss


def _run_backward(
    grad_loss: Tensor, pred: Tensor, keypoints: Tensor, visible: Tensor, *arguments: Any
) -> Tensor:
    options, backend = Options(*arguments[:-1]), arguments[-1]
    tensors = (t.contiguous() for t in (grad_loss, pred, keypoints, visible))
    grad_loss, pred, keypoints, visible = tensors
    if backend == "triton" and pred.numel():
        from kernelpose.triton_kernels import heatmap_loss as kernels

        parameters = _parameters(pred, options)
        return kernels.backward(grad_loss, pred, keypoints, visible, *parameters)
    grad_pred = _gradient(pred)
    if pred.numel():
        shape, code = _native_shape(pred, options), _native.DTYPE_CODES[pred.dtype]
        addresses = [_native.address(t) for t in (grad_loss, pred, keypoints, visible, grad_pred)]
        _native.call("heatmap_loss_backward", pred, *addresses, shape, code)
    return grad_pred


def _parameters(pred: Tensor, options: Options) -> tuple[float, float, float, int]:
    """(ratio x, ratio y, sigma, codec) as all kernels take them."""
    size = (pred.shape[2], pred.shape[3])
    ratio = pixel_ratio(options.input_size, size, udp=options.codec == "udp")
    return *ratio, options.sigma, TARGET_CODECS.index(options.codec)


def _native_shape(pred: Tensor, options: Options) -> tuple[int | float, ...]:
    """ShapeTuple of csrc/bindings/heatmap_loss.cpp."""
    persons, joints, height, width = pred.shape
    return (persons * joints, height, width, *_parameters(pred, options))


def _output(pred: Tensor) -> Tensor:
    return pred.new_empty((), dtype=_statistics_dtype(pred))


def _gradient(pred: Tensor) -> Tensor:
    return pred.new_empty(pred.shape)


_ARGUMENTS = "SymInt[2] input_size, float sigma, str codec, str backend"


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pred, keypoints, visible, *ctx.arguments = inputs
    ctx.save_for_backward(pred, keypoints, visible)


def _backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    tensors = (grad_loss, *ctx.saved_tensors)
    run = _run_backward if is_plain(*tensors) else _op_backward
    return run(*tensors, *ctx.arguments), None, None, *(None for _ in ctx.arguments)


_op_backward = register(
    "heatmap_loss_backward",
    f"(Tensor grad_loss, Tensor pred, Tensor keypoints, Tensor visible, {_ARGUMENTS}) -> Tensor",
    _run_backward,
    lambda grad_loss, pred, *arguments: _gradient(pred),
    autograd=no_second_derivative("heatmap_loss"),
    autocast=False,
)
_op = register(
    "heatmap_loss",
    f"(Tensor pred, Tensor keypoints, Tensor visible, {_ARGUMENTS}) -> Tensor",
    _run_forward,
    lambda pred, *arguments: _output(pred),
    autograd=(_setup_context, _backward),
    autocast=False,
)

MAX_PIXELS = 2**24  # of a map: float32 tells all their places apart
MAX_EDGES = 12288  # rows and columns: their profiles lie in shared memory, 48 KiB of it


def _objection(
    backend: str, pred: Tensor, keypoints: Tensor, visible: Tensor, **options: Any
) -> str | None:
    if torch.compiler.is_exporting():  # or its batch size would get an upper bound
        return None
    persons, joints, height, width = pred.shape
    # (what, how many, below which number)
    limits = [("pixels of a map", height * width, MAX_PIXELS)]
    if backend == "cuda":
        limits.append(("rows and columns of a map together", height + width, MAX_EDGES))
    if backend in ("cuda", "triton"):
        limits.append(("maps", persons * joints, 2**31))
    for what, count, limit in limits:
        if count >= limit:
            return f"it takes fewer than {limit} {what}, and this has {count}"
    return None


def _automatic(pred: Tensor) -> tuple[str, ...]:
    """On a GPU nothing was measured yet; CUDA C++ stands first."""
    return {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}.get(pred.device.type, ())


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch of ViTPose's heatmaps."""
    pred = torch.empty(64, 17, 64, 48, device=device, dtype=dtype)
    keypoints = torch.empty(64, 17, 2, device=device)
    return (pred, keypoints, keypoints[..., 0]), {"input_size": (256, 192)}


_HALVES = (torch.float16, torch.bfloat16)

register_backends(
    OpSpec(
        name="heatmap_loss",
        dtypes={
            "cuda": (torch.float32, *_HALVES),
            "triton": (torch.float32, *_HALVES),
            "cpu": (torch.float32, *_HALVES, torch.float64),
            "eager": (torch.float32, *_HALVES, torch.float64),
        },
        directions="fwd+bwd",
        automatic=_automatic,
        objection=_objection,
        example=_example,
    )
)
