"""Keypoints from SimCC logits, one classification over bins per axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelpose import _native
from kernelpose.backend import OpSpec, choose
from kernelpose.backend import register as register_backends
from kernelpose.ops._register import is_plain, register
from kernelpose.reference.decode_simcc import decode_simcc as reference


def decode_simcc(
    x: Tensor,
    y: Tensor,
    centers: Tensor | None = None,
    scales: Tensor | None = None,
    *,
    split_ratio: float = 2.0,
    udp: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The best bin per axis as a point, and the smaller of the two maxima as its score.

    Li et al., "SimCC: a Simple Coordinate Classification Perspective for Human Pose Estimation",
    2022. One pass over the logits; of equal maxima the first counts.

    Args:
        x, y: (P, K, bins of the width) and (P, K, bins of the height) of one dtype: float32,
            float16, bfloat16 or, in "eager", float64; compared in float32. A non-contiguous tensor
            is copied once.
        centers, scales: (P, 2) of the crops in image pixels, scales as (width, height); both or
            neither.
        split_ratio: bins per pixel of the model's input.
        udp: whether scales span the input's pixel centres (size - 1) or its cells (size).
        backend: "cuda", "triton", "cpu" or "eager"; None chooses, see `kernelpose.backend`.

    Returns:
        Keypoints (P, K, 2) and scores (P, K), float32 and without gradient on every backend. The
        keypoints are pixels of the image with centers and scales, else of the model's input. A
        joint whose score is not positive lies at -1 / split_ratio on both axes of the input (mapped
        to the image as any point is); one whose logits hold NaN does too, with score 0.

    Raises:
        ValueError: a shape or number does not fit. TypeError: not a floating-point tensor, or two
        dtypes. BackendError: the backend asked for cannot run this.
    """
    _check(x, y, split_ratio)
    _check_crops(x, y, centers, scales, split_ratio, udp)
    x, y = x.detach(), y.detach()
    if centers is not None and scales is not None:
        centers, scales = centers.detach().float(), scales.detach().float()
    options = {"split_ratio": split_ratio, "udp": udp}
    chosen = choose("decode_simcc", backend, x, y, centers, scales, **options)
    if chosen == "eager":
        return reference(x, y, centers, scales, split_ratio, udp)
    run = _run if is_plain(x, y, centers, scales) else _op
    points, scores = run(x, y, centers, scales, split_ratio, udp, chosen)
    return points, scores


def _check(x: Tensor, y: Tensor, split_ratio: float) -> None:
    for name, tensor in (("x", x), ("y", y)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; expected a tensor.")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; expected a floating-point tensor.")
        if tensor.ndim != 3 or tensor.shape[2] == 0:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected (P, K, bins), bins >= 1."
            )
    if y.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"y has shape {tuple(y.shape)}; expected {(*x.shape[:2], 'bins')}, P and K of x."
        )
    if y.dtype != x.dtype:
        raise TypeError(f"y is {y.dtype}; expected {x.dtype}, as x.")
    if y.device != x.device:
        raise ValueError(f"y is on {y.device}; expected {x.device}, as x.")
    if not isinstance(split_ratio, int | float) or not split_ratio > 0:
        raise ValueError(f"split_ratio is {split_ratio!r}; expected a positive number.")


def _check_crops(
    x: Tensor,
    y: Tensor,
    centers: Tensor | None,
    scales: Tensor | None,
    split_ratio: float,
    udp: bool,
) -> None:
    if centers is None and scales is None:
        return
    for name, tensor in (("centers", centers), ("scales", scales)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(
                f"{name} is {given}; expected a floating-point tensor, as centers and scales go "
                "together."
            )
        if tuple(tensor.shape) != (x.shape[0], 2):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {(x.shape[0], 2)}, (P, 2) with "
                "P of x."
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, as x.")
    for name, tensor in (("x", x), ("y", y)):
        if udp and tensor.shape[2] <= split_ratio:
            raise ValueError(
                f"{name} has {tensor.shape[2]} bins; expected more than split_ratio, "
                f"{split_ratio}: under UDP an input has two pixels or more."
            )


def _run(
    x: Tensor,
    y: Tensor,
    centers: Tensor | None,
    scales: Tensor | None,
    split_ratio: float,
    udp: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    x, y = x.contiguous(), y.contiguous()
    if centers is not None and scales is not None:
        centers, scales = centers.contiguous(), scales.contiguous()
    points, scores = _outputs(x)
    if scores.numel() == 0:
        return points, scores
    spans = [bins / split_ratio - udp for bins in (x.shape[2], y.shape[2])]
    if backend == "triton":
        from kernelpose.triton_kernels import decode_simcc as kernels

        kernels.forward(x, y, centers, scales, points, scores, split_ratio, spans)
        return points, scores
    addresses = [_native.address(t) for t in (x, y, centers, scales, points, scores)]
    shape = (*x.shape, y.shape[2], split_ratio, *spans)
    _native.call("decode_simcc", x, *addresses, shape, _native.DTYPE_CODES[x.dtype])
    return points, scores


def _outputs(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    persons, joints, _bins = x.shape
    points = x.new_empty(persons, joints, 2, dtype=torch.float32)
    return points, x.new_empty(persons, joints, dtype=torch.float32)


_op = register(
    "decode_simcc",
    "(Tensor x, Tensor y, Tensor? centers, Tensor? scales, float split_ratio, bool udp, "
    "str backend) -> (Tensor, Tensor)",
    _run,
    _outputs,
    autocast=False,
)


def _objection(backend: str, x: Tensor, y: Tensor, *crops: Tensor | None, **_: Any) -> str | None:
    if torch.compiler.is_exporting():  # or sizes would get an upper bound
        return None
    limits = [("bins along an axis", max(x.shape[2], y.shape[2]), 2**24)]  # exact in float32
    if backend in ("cuda", "triton"):
        limits.append(("joints of all persons", x.shape[0] * x.shape[1], 2**30))
    for what, count, limit in limits:
        if count >= limit:
            return f"it takes fewer than {limit} {what}, and this has {count}"
    return None


def _automatic(x: Tensor) -> tuple[str, ...]:
    return ("cuda", "triton") if x.is_cuda else ("cpu",)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Eight persons, COCO's joints, a 256 x 192 input."""
    x, y = (torch.empty(8, 17, bins, device=device, dtype=dtype) for bins in (384, 512))
    return (x, y), {}


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

register_backends(
    OpSpec(
        name="decode_simcc",
        dtypes={
            "cuda": _FLOATS,
            "triton": _FLOATS,
            "cpu": _FLOATS,
            "eager": (*_FLOATS, torch.float64),
        },
        directions="fwd",
        automatic=_automatic,
        objection=_objection,
        example=_example,
    )
)
