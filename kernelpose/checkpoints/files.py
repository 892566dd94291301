"""Checkpoint files: read without running code from them, written whole or not at all."""

from __future__ import annotations

import os
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernelpose.checkpoints import safetensors
from kernelpose.data.files import replacing
from kernelpose.errors import UserError

StateDict = dict[str, torch.Tensor]

# What torch.load raises for a damaged file depends on where the damage is. A test damages files at
# random to find what is not here.
_DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)


def read_state_dict(checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> StateDict:
    """The tensors of a checkpoint, on the CPU for a file.

    Args:
        checkpoint: a file of torch.save or safetensors, or what such a file holds; a state_dict,
            or a mapping with one under "state_dict".

    Raises UserError if there is no such file, if it is no checkpoint, is damaged, or cannot be
    unpickled without running code.
    """
    if isinstance(checkpoint, Mapping):
        return _state_dict(checkpoint, "checkpoint")
    path = Path(checkpoint)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; expected a checkpoint."
        ) from error
    if safetensors.recognises(head):
        return safetensors.read(path)
    # A zip archive, or the bare pickle of torch < 1.6.
    if not head.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise UserError(
            f"{path} is not a checkpoint; expected a file of torch.save or safetensors."
        )
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        code = re.search(r"GLOBAL (\w\S*)", str(error))
        if code:
            raise UserError(
                f"{path} needs code to unpickle ({code[1]}), which is not run; expected a "
                "state_dict saved alone."
            ) from error
        raise UserError(
            f"{path} is truncated or damaged; expected a file that torch.load can read."
        ) from error
    return _state_dict(content, str(path))


def write_state_dict(path: Path, state_dict: StateDict, *, wrap: bool) -> None:
    """Writes a file that appears under its name only when it is complete.

    Args:
        path: replaced if it exists; a name that ends in .safetensors gets that format.
        state_dict: tensors.
        wrap: put them under the key "state_dict" (torch.save only).

    Raises UserError if the file cannot be written.
    """
    with replacing(path) as part:
        if path.suffix == ".safetensors":
            safetensors.write(part, state_dict)
            return
        try:
            torch.save({"state_dict": state_dict} if wrap else state_dict, part)
        except RuntimeError as error:  # how torch.save reports what the system refuses
            raise UserError(f"{path} cannot be written: {str(error).splitlines()[0]}.") from error


def _state_dict(content: object, where: str) -> StateDict:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if isinstance(content, Mapping):
        tensors = {
            name: value
            for name, value in content.items()
            if isinstance(name, str) and isinstance(value, torch.Tensor)
        }
        if tensors:
            # DistributedDataParallel puts its own name before all of the model's.
            wrapped = all(name.startswith("module.") for name in tensors)
            return {
                name.removeprefix("module.") if wrapped else name: tensor
                for name, tensor in tensors.items()
            }
    raise UserError(f"{where} holds no state_dict; expected a mapping from names to tensors.")


def _numpy_globals() -> list[Any]:
    """Arrays and scalars: mmpose 1.x keeps the data set's joint weights beside the tensors."""
    reconstruct = np.zeros(1).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [np.ndarray, np.dtype, (_encode, "_codecs.encode")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    kinds = ("?", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "U", "S")
    return allowed + [type(np.dtype(kind)) for kind in kinds]


def _encode(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 spell bytes."""
    return text.encode(encoding)
