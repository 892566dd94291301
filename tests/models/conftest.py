"""What the tests of models share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _forget_compiled_models() -> Iterator[None]:
    """Dynamo compiles one code object for 8 models at most, and all share PoseModel.forward."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
