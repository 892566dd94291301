"""When kernels for inference alone may stand in for layers."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelpose.backend import core_unasked
from kernelpose.ops._register import is_plain


def core_infers(*tensors: Tensor | None) -> bool:
    """Whether such kernels of the core may take these: float32 on a CPU, where neither a gradient
    nor a graph is wanted, no backend is named, and autocast asks for nothing less."""
    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.dtype == torch.float32):
            return False
    return is_plain(*tensors) and core_unasked() and not torch.is_autocast_enabled("cpu")
