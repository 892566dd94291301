"""The native core: loading it, keeping the error where that fails, and calling it on tensors."""

from __future__ import annotations

import traceback
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

core: ModuleType | None
import_error: str | None  # the full traceback where `core` is None

try:
    from kernelpose import _C

    core, import_error = _C, None
except ImportError:
    core, import_error = None, traceback.format_exc()

# As in csrc/include/kernelpose/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

HAS_CUDA = core is not None and bool(core.cuda_archs)


def runs_on(capability: tuple[int, int]) -> bool:
    """Whether the core holds code for a GPU: of its own generation, or PTX of one no newer."""
    assert core is not None
    for arch in core.cuda_archs.split(","):
        number, _, kind = arch.partition("-")
        built = divmod(int(number.rstrip("af")), 10)
        if built <= capability and (kind != "real" or built[0] == capability[0]):
            return True
    return False


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def call(function: str, like: Tensor, *args: Any) -> Any:
    """What `<device>_<function>(*args, ...)` of the core returns, run on the device of `like`.

    The last argument is added here: on a CPU the number of threads that torch has, on a GPU torch's
    current stream, read on every call, as graph capture and side streams need it.
    """
    if like.is_cpu:
        return getattr(core, f"cpu_{function}")(*args, torch.get_num_threads())
    index = like.device.index
    with torch.cuda.device(index):
        stream = torch._C._cuda_getCurrentRawStream(index)
        return getattr(core, f"cuda_{function}")(*args, stream)


def workspace(function: str, like: Tensor, *args: Any) -> Tensor | None:
    """Scratch memory of `cuda_<function>_workspace(*args)` bytes, from torch's allocator."""
    if like.is_cpu:
        return None
    with torch.cuda.device(like.device.index):
        size = getattr(core, f"cuda_{function}_workspace")(*args)
    return torch.empty(size, dtype=torch.uint8, device=like.device) if size else None
