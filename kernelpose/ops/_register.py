"""Registering ops with torch.library, and the two short ways around the dispatcher.

An op is registered once, with its kernel backends behind it (`cuda`, `triton`, `cpu`); `torch` and
`eager` are ordinary PyTorch, which needs no registration and which torch.compile and exporters see
through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernelpose.backend import device_type

_library = torch.library.Library("kernelpose", "FRAGMENT")


def register(
    name: str,
    signature: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    autograd: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    autocast: int = 1,
) -> Callable[..., Any]:
    """Define kernelpose::<name> and return it.

    run: the implementation for CPU and CUDA tensors, given the op's arguments.
    fake: the same for tensors without storage.
    autograd: (setup_context, backward) as torch.library.register_autograd takes them.

    autocast: how many of the first arguments, tensors or None, are cast to autocast's dtype under
        autocast. False for an op that computes in float32 whatever it is given.
    """
    qualified = f"kernelpose::{name}"
    _library.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(qualified, fake, lib=_library)
    if autograd is not None:
        setup_context, backward = autograd
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=_library
        )
    op = getattr(torch.ops.kernelpose, name).default
    for device in ("cpu", "cuda") if autocast else ():
        key = f"Autocast{device.upper()}" if device == "cuda" else "AutocastCPU"
        _library.impl(name, _autocast(op, autocast, device, key), key)
    return op


def _autocast(op: Callable[..., Any], count: int, device: str, key: str) -> Callable[..., Any]:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device))

    def cast_and_run(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*map(cast, args[:count]), *args[count:])

    return cast_and_run


def autocast(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype that autocast would give it: what the backend is to be chosen for."""
    device = device_type(tensor)
    if device == "meta" or not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Around plain PyTorch that computes in the dtype of its inputs whatever autocast says."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call may go straight to its backend, around the dispatcher.

    True where nobody watches: no gradient is wanted, nothing traces, and every tensor is an
    ordinary one. At batch 1 the 10 to 20 microseconds of the dispatcher count.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return False
    grad = torch.is_grad_enabled()
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    for t in tensors:  # a loop: all() of a generator takes three times as long
        if t is None:
            continue
        if type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return False
        if not (t.is_cpu or t.is_cuda) or (grad and t.requires_grad) or wrapped(t):
            return False
    return True


def no_second_derivative(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`autograd` of the registered backward of op `name`, whose last argument is the backend."""

    def keep_backend(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = inputs[-1]

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"backend is {ctx.backend!r}; expected 'eager' for a second derivative of {name}."
        )

    return keep_backend, refuse
