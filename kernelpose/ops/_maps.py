"""Feature maps in PyTorch's two memory formats, which the kernels read and write as they lie."""

from __future__ import annotations

import torch
from torch import Tensor


def check_maps(name: str, maps: Tensor, shape: str = "(B, C, H, W)") -> None:
    """Raise where `maps` is no floating-point tensor of four dimensions."""
    if not isinstance(maps, Tensor):
        raise TypeError(f"{name} is {type(maps).__name__}; expected a tensor.")
    if not maps.is_floating_point():
        raise TypeError(f"{name} is {maps.dtype}; expected a floating-point tensor.")
    if maps.ndim != 4:
        raise ValueError(f"{name} has shape {tuple(maps.shape)}; expected {shape}.")


def memory_format(maps: Tensor) -> torch.memory_format:
    """The format that kernels take maps (B, C, H, W) in: their own, where they are dense."""
    if maps.is_contiguous() or maps.stride(1) != 1:
        return torch.contiguous_format
    return torch.channels_last


def statistics_dtype(maps: Tensor) -> torch.dtype:
    """The dtype of sums over maps, and of the parameters that kernels take with them."""
    return torch.float64 if maps.dtype == torch.float64 else torch.float32


def native_shape(maps: Tensor) -> tuple[int | bool, ...]:
    """(batch, channels, pixels, channels_last), as csrc/include/kernelpose/maps.h has them."""
    batch, channels, height, width = maps.shape
    return batch, channels, height * width, not maps.is_contiguous()


def too_large(backend: str, maps: Tensor, elements: bool = False) -> str | None:
    """The objection to maps beyond a GPU's grid, or 32-bit places in an image, as Triton has and,
    with `elements`, the CUDA kernels as well."""
    if backend == "cpu" or torch.compiler.is_exporting():  # or sizes would get an upper bound
        return None
    limits = [("channels of all images", maps.shape[0] * maps.shape[1])]
    if backend == "triton" or elements:
        limits.append(("elements of an image", maps.shape[1] * maps.shape[2] * maps.shape[3]))
    for what, count in limits:
        if count >= 2**31:
            return f"it takes fewer than {2**31} {what}, and this has {count}"
    return None
