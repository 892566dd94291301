"""Which backend may run an op, why not the others, and which one is chosen.

The order of choice: the op's `backend=` argument, `with kernelpose.backend(...)`, the environment
variable KERNELPOSE_BACKEND (read when kernelpose is imported, checked when an op is called), and
else the first backend of the op's measured order that has no objection. An explicit choice that
cannot run raises `BackendError` with the objection.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from kernelpose import _native
from kernelpose.errors import UserError

BACKENDS = ("cuda", "triton", "cpu", "torch", "eager")
"""CUDA C++, Triton, C++ on the CPU, one library call of PyTorch, and the plain reference."""

HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class BackendError(RuntimeError):
    """The backend that was asked for cannot run the op on these inputs."""


@dataclass(frozen=True)
class OpSpec:
    """What the backend mechanism knows of an op; each op file registers its own.

    dtypes: for each backend it has, the dtypes that it computes.
    directions: "fwd+bwd", or "fwd" for an op without gradient.
    automatic: main tensor -> the backends to try in this order before eager, as measured.
    objection: (backend, *inputs, **options) -> why this backend cannot run these inputs, or None;
        asked only after device, dtype and installation have passed.
    example: (device, dtype) -> the inputs and options of a typical call.
    """

    name: str
    dtypes: Mapping[str, tuple[torch.dtype, ...]]
    directions: Literal["fwd", "fwd+bwd"]
    automatic: Callable[[Tensor], tuple[str, ...]]
    objection: Callable[..., str | None]
    example: Callable[[torch.device, torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]]


OPS: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    OPS[spec.name] = spec
    return spec


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; expected one of {', '.join(BACKENDS)}.")
    return name


# A plain global: torch.compile guards on it, so compiled code follows a change; it does not follow
# thread-locals or context variables.
_chosen: str | None = os.environ.get("KERNELPOSE_BACKEND") or None


def check_environment() -> None:
    """Raise UserError where KERNELPOSE_BACKEND or KERNELPOSE_CPU_ISA is none of its values."""
    if _chosen is not None and _chosen not in BACKENDS:
        raise UserError(
            f"KERNELPOSE_BACKEND is {_chosen!r}; expected one of {', '.join(BACKENDS)}."
        )
    if _native.core is not None:
        try:
            _native.core.cpu_isa()
        except ValueError as error:
            raise UserError(str(error)) from None


class backend:
    """Context manager: within it every op runs on the named backend, or raises.

    The choice holds for the whole process, compiled code included, so threads must not overlap two
    choices.
    """

    def __init__(self, name: str) -> None:
        self._name = _known(name)
        self._outer: list[str | None] = []

    def __enter__(self) -> None:
        global _chosen
        self._outer.append(_chosen)
        _chosen = self._name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Literal[False]:
        global _chosen
        _chosen = self._outer.pop()
        return False


def device_type(tensor: Tensor) -> str:
    """`tensor.device.type`, without the microsecond that making the device and its name take."""
    if not torch.compiler.is_compiling():
        if tensor.is_cpu:
            return "cpu"
        if tensor.is_cuda:
            return "cuda"
    return tensor.device.type


def _unavailable(name: str, tensor: Tensor) -> str | None:
    """Why a backend is out of the question on this device, whatever the op."""
    if name in ("torch", "eager"):
        return None
    device = device_type(tensor)
    if not torch.compiler.is_compiling() and (
        torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return "torch.func transforms and forward-mode derivatives need plain PyTorch"
    if name == "triton":
        if not HAS_TRITON:
            return "Triton is not installed"
        if device != "cuda" and not TRITON_INTERPRETED:
            return f"it runs on CUDA tensors, and this one is on {device}"
        return None
    if device != name:
        return f"it runs on {name.upper()} tensors, and this one is on {device}"
    if _native.core is None:
        return "the native core could not be imported (python -m kernelpose.info shows why)"
    if name == "cuda":
        if not _native.HAS_CUDA:
            return "the native core was built without CUDA"
        capability = torch.cuda.get_device_capability(tensor.device)
        if not _native.runs_on(capability):
            built = _native.core.cuda_archs
            gpu = f"sm_{capability[0]}{capability[1]}"
            return f"the native core has code for {built}, and this GPU is {gpu}"
    return None


def why_not(op: str, name: str, *inputs: Any, **options: Any) -> str | None:
    """Why backend `name` cannot run `op` on these inputs; None if it can.

    `inputs` and `options` are those of the op's public function; the first input is its main tensor
    (or the first of a list of them), whose device and dtype count.
    """
    if name == "eager":
        return None
    return _objection(OPS[op], _known(name), inputs, options)


def _main(inputs: tuple[Any, ...]) -> Tensor:
    first = inputs[0]
    return first if isinstance(first, Tensor) else first[0]


def _objection(
    spec: OpSpec, name: str, inputs: tuple[Any, ...], options: Mapping[str, Any]
) -> str | None:
    if name not in spec.dtypes:
        return f"{spec.name} has no {name} backend"
    tensor = _main(inputs)
    reason = _unavailable(name, tensor)
    if reason is not None:
        return reason
    if tensor.dtype not in spec.dtypes[name]:
        return f"it does not compute {str(tensor.dtype).removeprefix('torch.')}"
    return spec.objection(name, *inputs, **options)


def choose(op: str, requested: str | None, *inputs: Any, **options: Any) -> str:
    """The backend that runs this call."""
    asked = requested if requested is not None else _chosen
    if asked is not None:
        if requested is None and asked not in BACKENDS:
            check_environment()
        reason = why_not(op, _known(asked), *inputs, **options)
        if reason is not None:
            raise BackendError(
                f"backend is {asked!r}; expected one that can run {op}, which it cannot: {reason}."
            )
        return asked
    spec = OPS[op]
    for name in spec.automatic(_main(inputs)):
        if _objection(spec, name, inputs, options) is None:
            return name
    return "eager"


def core_unasked() -> bool:
    """Whether `choose` gives "cpu" for plain CPU tensors that "cpu" comes first for, has no
    objection to and computes, asking for nothing: the short answer, for calls as quick as it."""
    return (
        _chosen is None
        and _native.core is not None
        and torch.autograd.forward_ad._current_level < 0
    )
