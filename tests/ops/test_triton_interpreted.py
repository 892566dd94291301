"""The tests of this folder on Triton's interpreter, where there is no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernelpose.backend import HAS_TRITON, TRITON_INTERPRETED

HERE = Path(__file__).parent


QUICK = (
    "one_graph or follows or registered or inference or transforms or trace or derivative or "
    "forward_mode or never_written or large_scores"
)
REST = "opcheck or export or autocast or deterministic or contiguous or dynamic"


@pytest.mark.skipif(TRITON_INTERPRETED, reason="this process has the interpreter")
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's tests run on the GPU")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("names", [QUICK, pytest.param(REST, marks=pytest.mark.full)])
def test_on_the_interpreter(names: str) -> None:
    """In a process of its own: Triton chooses its interpreter for the life of a process.

    The smallest cases; the parity of the kernels is in tests/triton.
    """
    chosen = f"triton and not (full or grid or odd or shifted or many) and ({names})"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--full", str(HERE), "-k", chosen],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 5, done.stdout
