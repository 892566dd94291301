"""Which cases of an op of maps go through the interpreter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

QUICK_NUMBERS = 30_000  # the interpreter takes seconds for more


def interpreted(cases: Mapping[str, Any]) -> list[Any]:
    """Names of the cases that have elements, as pytest parameters; large maps with `--full`."""
    return [
        pytest.param(name, marks=pytest.mark.full if math.prod(case.shape) > QUICK_NUMBERS else ())
        for name, case in cases.items()
        if 0 not in case.shape
    ]
