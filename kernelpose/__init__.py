"""Pose transformers, and the fused kernels that make them fast, on NVIDIA GPUs and on CPUs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kernelpose import nn, ops
from kernelpose.backend import BackendError, backend, why_not
from kernelpose.errors import UserError

if TYPE_CHECKING:
    from kernelpose.checkpoints import load_checkpoint
    from kernelpose.models import create_model, list_models
    from kernelpose.pipeline import Predictor

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Predictor",
    "UserError",
    "backend",
    "create_model",
    "list_models",
    "load_checkpoint",
    "nn",
    "ops",
    "why_not",
]

# Imported on first use, so that `import kernelpose` stays quick.
_LAZY = {
    "Predictor": "kernelpose.pipeline",
    "create_model": "kernelpose.models",
    "list_models": "kernelpose.models",
    "load_checkpoint": "kernelpose.checkpoints",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kernelpose' has no attribute {name!r}")
