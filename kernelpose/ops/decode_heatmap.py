"""Keypoints from heatmaps: arg-max, a sub-pixel refinement, and the way back to the image."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from kernelpose import _native
from kernelpose.backend import OpSpec, choose
from kernelpose.backend import register as register_backends
from kernelpose.ops._register import is_plain, register
from kernelpose.reference.decode_heatmap import DECODE_MODES, blur_weights
from kernelpose.reference.decode_heatmap import decode_heatmap as reference

MAX_KERNEL = 63  # kMaxTaps in csrc/include/kernelpose/decode_heatmap.h

_weights = functools.cache(blur_weights)


def decode_heatmap(
    heatmaps: Tensor,
    centers: Tensor | None = None,
    scales: Tensor | None = None,
    *,
    mode: str = "mmpose1",
    kernel: int = 11,
    udp: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sub-pixel peaks of heatmaps, in the pixels of the map or of the image, in one pass.

    ======================  ===================================================================
    mode                    refinement of the arg-max
    ======================  ===================================================================
    ``mmpose1``             UDP's Newton step on log maps blurred with zeros outside and rescaled
                            to the old maximum (mmpose 1.x)
    ``mmpose0``             the same, blurred with mirrored borders, not rescaled (mmpose 0.x,
                            official ViTPose)
    ``transformers``        the same, blurred with sigma 0.8 whatever the kernel (transformers)
    ``dark``                DARK's Newton step with differences over two pixels, on the blur of
                            ``mmpose1``; none near the border
    ``shift``               a quarter pixel towards the higher neighbour
    ``argmax``              none
    ======================  ===================================================================

    Newton step: Huang et al., "The Devil is in the Details", 2020; Zhang et al.,
    "Distribution-Aware Coordinate Representation", 2020.

    Args:
        heatmaps: (P, K, h, w), floating point; computed in float32. Non-contiguous maps are copied
            once.
        centers, scales: (P, 2) of the crops in image pixels, scales as (width, height); both or
            neither.
        kernel: odd width of the blur in pixels; 11 goes with targets of sigma 2.
        udp: whether scales span the map's pixel centres (size - 1) or its cells (size).
        backend: "cuda", "triton", "cpu" or "eager"; None chooses, see `kernelpose.backend`.

    Returns:
        Keypoints (P, K, 2) as x, y and scores (P, K), float32 and without gradient on every
        backend. The keypoints are pixels of the image with centers and scales, else of the map. The
        score is the maximum before the blur; of equal maxima the first in rows counts. A map whose
        maximum is not positive has no location: (-1, -1) on the map (taken to the image as any
        point is), in every mode. A map that holds NaN, or whose maximum is infinite, neither has
        one; its score is 0.

    Raises:
        ValueError: a shape, name or number does not fit. TypeError: not a floating-point tensor.
        BackendError: the backend asked for cannot run this.
    """
    _check(heatmaps, mode, kernel)
    _check_crops(heatmaps, centers, scales, udp)
    heatmaps = heatmaps.detach()
    if centers is not None and scales is not None:
        centers, scales = centers.detach().float(), scales.detach().float()
    options = {"mode": mode, "kernel": kernel, "udp": udp}
    chosen = choose("decode_heatmap", backend, heatmaps, centers, scales, **options)
    if chosen == "eager":
        return reference(heatmaps, centers, scales, mode, kernel, udp)
    run = _run if is_plain(heatmaps, centers, scales) else _op
    keypoints, maxima = run(heatmaps, centers, scales, mode, kernel, udp, chosen)
    return keypoints, maxima


def _check(heatmaps: Tensor, mode: str, kernel: int) -> None:
    if not isinstance(heatmaps, Tensor):
        raise TypeError(f"heatmaps is {type(heatmaps).__name__}; expected a tensor.")
    if not heatmaps.is_floating_point():
        raise TypeError(f"heatmaps is {heatmaps.dtype}; expected a floating-point tensor.")
    if heatmaps.ndim != 4 or 0 in heatmaps.shape[2:]:
        raise ValueError(
            f"heatmaps has shape {tuple(heatmaps.shape)}; expected (P, K, h, w), h, w >= 1."
        )
    if mode not in DECODE_MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(DECODE_MODES)}.")
    if not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel is {kernel!r}; expected a positive odd number.")


def _check_crops(
    heatmaps: Tensor, centers: Tensor | None, scales: Tensor | None, udp: bool
) -> None:
    if centers is None and scales is None:
        return
    persons, _, height, width = heatmaps.shape
    for name, tensor in (("centers", centers), ("scales", scales)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(
                f"{name} is {given}; expected a floating-point tensor, as centers and scales go "
                "together."
            )
        if tuple(tensor.shape) != (persons, 2):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {(persons, 2)}, (P, 2) with P "
                "of heatmaps."
            )
        if tensor.device != heatmaps.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {heatmaps.device}.")
    if udp and min(height, width) < 2:
        raise ValueError(
            f"heatmaps has shape {tuple(heatmaps.shape)}; expected h, w >= 2 to reach the image "
            "under UDP."
        )


def _run(
    heatmaps: Tensor,
    centers: Tensor | None,
    scales: Tensor | None,
    mode: str,
    kernel: int,
    udp: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    heatmaps = heatmaps.contiguous()
    if centers is not None and scales is not None:
        centers, scales = centers.contiguous(), scales.contiguous()
    keypoints, maxima = _outputs(heatmaps)
    if maxima.numel() == 0:
        return keypoints, maxima
    weights = _weights(mode, kernel)
    if backend == "triton":
        from kernelpose.triton_kernels import decode_heatmap as kernels

        kernels.forward(heatmaps, centers, scales, keypoints, maxima, mode, weights, udp)
        return keypoints, maxima
    addresses = [_native.address(t) for t in (heatmaps, centers, scales, keypoints, maxima)]
    problem = (*heatmaps.shape, DECODE_MODES.index(mode), udp, weights)
    _native.call(
        "decode_heatmap", heatmaps, *addresses, problem, _native.DTYPE_CODES[heatmaps.dtype]
    )
    return keypoints, maxima


def _outputs(heatmaps: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    persons, joints = heatmaps.shape[:2]
    keypoints = heatmaps.new_empty(persons, joints, 2, dtype=torch.float32)
    return keypoints, heatmaps.new_empty(persons, joints, dtype=torch.float32)


_op = register(
    "decode_heatmap",
    "(Tensor heatmaps, Tensor? centers, Tensor? scales, str mode, int kernel, bool udp, "
    "str backend) -> (Tensor, Tensor)",
    _run,
    _outputs,
    autocast=False,
)


def _objection(
    backend: str,
    heatmaps: Tensor,
    *crops: Tensor | None,
    mode: str = "mmpose1",
    kernel: int = 11,
    **_: Any,
) -> str | None:
    if kernel > MAX_KERNEL and mode not in ("shift", "argmax"):
        return f"its blur is at most {MAX_KERNEL} pixels wide, and this is {kernel}"
    if torch.compiler.is_exporting():  # or sizes would get an upper bound
        return None
    persons, joints, height, width = heatmaps.shape
    limits = [("pixels of a map", height * width, 2**30)]
    if backend in ("cuda", "triton"):
        limits.append(("joints of all persons", persons * joints, 2**31))
    for what, count, limit in limits:
        if count >= limit:
            return f"it takes fewer than {limit} {what}, and this has {count}"
    return None


def _automatic(heatmaps: Tensor) -> tuple[str, ...]:
    return ("cuda", "triton") if heatmaps.is_cuda else ("cpu",)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Eight persons, COCO's joints, a 256 x 192 input."""
    heatmaps = torch.empty(8, 17, 64, 48, device=device, dtype=dtype)
    crops = [torch.empty(8, 2, device=device) for _ in range(2)]
    return (heatmaps, *crops), {"mode": "mmpose1", "kernel": 11, "udp": True}


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

register_backends(
    OpSpec(
        name="decode_heatmap",
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
