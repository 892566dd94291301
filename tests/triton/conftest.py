"""Loads the Triton kernels: compiled where a GPU is, else for Triton's interpreter.

Triton chooses for its own functions when it is first imported (tests/conftest.py sets the variable
for that), for ours when they are decorated, and looks again in each call. So the variable is set
here for the imports and during the tests of this folder; the others, and the processes they start,
do not see it. Nor does kernelpose, which looks when it is imported: to it the interpreter is not a
backend unless the user set the variable.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import kernelpose  # noqa: F401  # before the variable is set

INTERPRET = not torch.cuda.is_available()

with pytest.MonkeyPatch.context() as patch:
    if INTERPRET:
        patch.setenv("TRITON_INTERPRET", "1")
    triton = pytest.importorskip("triton")
    from kernelpose.triton_kernels import (  # noqa: F401  # each op's, decorated here
        add_layer_norm,
        cascaded_attention,
        channel_fuse,
        crop_normalize,
        decode_heatmap,
        decode_simcc,
        dilated_pyramid,
        dual_gate,
        dwconv_gelu,
        flip_merge,
        grn,
        heatmap_loss,
        inverted_bottleneck,
        multi_granularity,
        multi_granularity_backward,
        reduced_attention,
        spatial_gate,
        window_attention,
    )


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the calls of kernels, where no GPU is."""
    interpreted = not isinstance(triton.language.sum, triton.JITFunction)
    assert interpreted == INTERPRET, "Triton was imported before its interpreter was chosen"
    if INTERPRET:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def kernels(interpreter: None) -> ModuleType:
    return window_attention


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRET else "cuda"
