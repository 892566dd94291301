"""The flip test's mean of heatmaps and those of the mirrored input."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernelpose import _native
from kernelpose.backend import OpSpec, choose
from kernelpose.backend import register as register_backends
from kernelpose.ops._register import is_plain, register
from kernelpose.reference.flip_merge import flip_merge as reference

MAX_JOINTS = 1024


def flip_merge(
    heatmaps: Tensor,
    flipped: Tensor,
    flip_pairs: Sequence[Sequence[int]],
    *,
    shift: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Mean of the maps of an input and those of its mirror image, mirrored back, joints swapped.

    One pass: each tensor is read once and the mean written once.

    Args:
        heatmaps: (P, K, h, w); float32, float16, bfloat16 or, on a CPU, float64. A non-contiguous
            tensor is copied once.
        flipped: the same of the horizontally mirrored input. A SimCC model's logits over columns
            are (P, K, w); its logits over rows, whose bins a mirror leaves alone, are merged as
            (P, K, h, 1).
        flip_pairs: indices (left, right) of the joints that a mirror exchanges, each joint once.
        shift: move the maps that are merged in right by one pixel, the first column repeated, for
            models whose inputs are not aligned at pixel centres; not under UDP.
        backend: "cuda", "triton", "cpu" or "eager"; None chooses, see `kernelpose.backend`. The
            first three have no gradient: where one is wanted, None chooses "eager".

    Returns:
        A tensor like heatmaps; the mean is computed in float32 (float64 for float64).

    Raises:
        ValueError: a shape or a pair does not fit. TypeError: not a floating-point tensor, or two
        dtypes. BackendError: the backend asked for cannot run this.
    """
    _check(heatmaps, flipped)
    if not isinstance(flip_pairs, Iterable):
        raise TypeError(f"flip_pairs is {flip_pairs!r}; expected pairs of joints.")
    order = _order(flip_pairs, heatmaps.shape[1])
    chosen = choose("flip_merge", backend, heatmaps, flipped, flip_pairs, shift=shift)
    if chosen == "eager":
        return reference(heatmaps, flipped, order, shift)
    run = _run if is_plain(heatmaps, flipped) else _op
    out: Tensor = run(heatmaps, flipped, order, shift, chosen)
    return out


def _check(heatmaps: Tensor, flipped: Tensor) -> None:
    for name, tensor in (("heatmaps", heatmaps), ("flipped", flipped)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; expected a tensor.")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; expected a floating-point tensor.")
    if heatmaps.ndim not in (3, 4):
        raise ValueError(
            f"heatmaps has shape {tuple(heatmaps.shape)}; expected (P, K, h, w) or (P, K, w)."
        )
    if flipped.shape != heatmaps.shape:
        raise ValueError(
            f"flipped has shape {tuple(flipped.shape)}; expected {tuple(heatmaps.shape)}, "
            "as heatmaps."
        )
    if flipped.dtype != heatmaps.dtype:
        raise TypeError(f"flipped is {flipped.dtype}; expected {heatmaps.dtype}, as heatmaps.")
    if flipped.device != heatmaps.device:
        raise ValueError(
            f"flipped is on {flipped.device}; expected {heatmaps.device}, as heatmaps."
        )


def _order(flip_pairs: Sequence[Sequence[int]], joints: int) -> list[int]:
    """The joint of the mirrored input that is each joint of the input."""
    order = list(range(joints))
    seen: set[int] = set()
    for pair in flip_pairs:
        try:
            left, right = map(operator.index, pair)
        except (TypeError, ValueError) as error:
            raise TypeError(f"flip_pairs holds {pair!r}; expected pairs of joints.") from error
        if not (0 <= left < joints and 0 <= right < joints):
            raise ValueError(f"flip_pairs holds ({left}, {right}); expected joints below {joints}.")
        if left == right or left in seen or right in seen:
            raise ValueError(f"flip_pairs holds ({left}, {right}); expected each joint once.")
        order[left], order[right] = right, left
        seen.update((left, right))
    return order


def _run(
    heatmaps: Tensor, flipped: Tensor, order: Sequence[int], shift: bool, backend: str
) -> Tensor:
    heatmaps, flipped = heatmaps.contiguous(), flipped.contiguous()
    out = torch.empty_like(heatmaps)
    if out.numel() == 0:
        return out
    if backend == "triton":
        from kernelpose.triton_kernels import flip_merge as kernels

        kernels.forward(heatmaps, flipped, out, order, shift)
        return out
    persons, joints = heatmaps.shape[:2]
    width = heatmaps.shape[-1]
    rows = heatmaps.numel() // (persons * joints * width)
    addresses = [_native.address(t) for t in (heatmaps, flipped, out)]
    shape = (persons * joints, rows, width, shift)
    _native.call(
        "flip_merge", heatmaps, *addresses, order, shape, _native.DTYPE_CODES[heatmaps.dtype]
    )
    return out


def _fake(heatmaps: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(heatmaps, memory_format=torch.contiguous_format)


_op = register(
    "flip_merge",
    "(Tensor heatmaps, Tensor flipped, int[] order, bool shift, str backend) -> Tensor",
    _run,
    _fake,
    autocast=False,
)


def _objection(
    backend: str,
    heatmaps: Tensor,
    flipped: Tensor,
    flip_pairs: Sequence[Sequence[int]],
    *,
    shift: bool = False,
) -> str | None:
    if torch.is_grad_enabled() and (heatmaps.requires_grad or flipped.requires_grad):
        return "it has no gradient, and an input requires one"
    if backend == "cpu" or torch.compiler.is_exporting():  # or sizes would get an upper bound
        return None
    persons, joints = heatmaps.shape[:2]
    limits = [
        ("joints", joints, MAX_JOINTS + 1),
        ("maps", persons * joints, 2**30),
        ("pixels of a map", math.prod(heatmaps.shape[2:]), 2**30),
    ]
    for what, count, limit in limits:
        if count >= limit:
            return f"it takes fewer than {limit} {what}, and this has {count}"
    return None


def _automatic(heatmaps: Tensor) -> tuple[str, ...]:
    return ("cuda", "triton") if heatmaps.is_cuda else ("cpu",)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Eight persons, COCO's joints."""
    maps = torch.empty(8, 17, 64, 48, device=device, dtype=dtype)
    return (maps, torch.empty_like(maps), [(i, i + 1) for i in range(1, 17, 2)]), {}


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

register_backends(
    OpSpec(
        name="flip_merge",
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
