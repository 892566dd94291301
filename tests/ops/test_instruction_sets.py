"""The CPU kernels of every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kernelpose import _native
from kernelpose.backend import OPS
from tests.conftest import ROOT

LEVELS = ("baseline", "avx2", "avx512")
CHOSEN = "parity or tail or far_out or special_maps or without_a_peak or rounded or TestWinograd"
# which have kernels that are no op's
MODULES = (
    "cru",
    "deconvolution",
    "depthwise_ffn",
    "mix_ffn",
    "packed_cascade",
    "sr_attention",
    "winograd",
)
FILES = ("tests/ops", *(f"tests/nn/test_{name}.py" for name in MODULES))


@pytest.mark.parametrize("isa", LEVELS)
def test_results_are_right(isa: str, run_python: Callable[..., str]) -> None:
    """In a process of its own: the core chooses for the life of a process."""
    assert _native.core is not None, _native.import_error
    ours = _native.core.cpu_isa()
    if isa == ours:
        pytest.skip(f"{isa} is what all other tests run")
    if LEVELS.index(isa) > LEVELS.index(ours):
        pytest.skip(f"this machine runs {ours} at best")
    names = f"({CHOSEN}) and not (cuda or triton)"
    options = ["-v", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-k", names]
    output = run_python(
        f"""
import sys
import pytest
from kernelpose import _native
assert _native.core.cpu_isa() == {isa!r}
sys.exit(pytest.main({[*options, *(str(ROOT / file) for file in FILES)]!r}))
""",
        KERNELPOSE_CPU_ISA=isa,
    )
    for op, spec in OPS.items():
        assert "cpu" not in spec.dtypes or f"tests/ops/test_{op}.py::test_parity" in output
