"""The safetensors format: an 8-byte length, a JSON header, the tensors' bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernelpose.errors import UserError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Of a header that is no JSON or nested too deep, of other JSON than a header, and of a shape that
# no tensor has.
_DAMAGE = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def recognises(head: bytes) -> bool:
    """Whether the first nine bytes of a file look like this format."""
    return len(head) == 9 and head[8:] == b"{"


def read(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file. Raises UserError if it is truncated or its header is wrong."""
    data = np.fromfile(path, dtype=np.uint8)
    start = 8 + int(data[:8].view("<u8")[0])
    try:
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        return {name: _tensor(data[start:], **entry) for name, entry in header.items()}
    except _DAMAGE as error:
        raise UserError(
            f"{path} is truncated or damaged; expected a header that fits it."
        ) from error


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes tensors, row-major, in the order of the mapping.

    Raises UserError for a dtype that the format has no name for.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise UserError(
                f"{name} is {tensor.dtype}; expected a dtype that safetensors can hold."
            )
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            if tensor.numel():
                flat = tensor.detach().cpu().contiguous().view(-1)
                file.write(flat.view(torch.uint8).numpy().tobytes())


def _tensor(
    data: np.ndarray[Any, np.dtype[np.uint8]], dtype: str, shape: list[int], data_offsets: list[int]
) -> torch.Tensor:
    begin, end = data_offsets
    kind = _DTYPES[dtype]
    if not 0 <= begin <= end <= len(data) or end - begin != math.prod(shape) * kind.itemsize:
        raise ValueError(f"data_offsets are {begin}, {end}; expected the bytes of {dtype} {shape}.")
    # A copy, as the bytes of a tensor need not be aligned to its type.
    tensor = torch.empty(shape, dtype=kind)
    if tensor.numel():
        tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(data[begin:end]))
    return tensor
