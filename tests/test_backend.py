"""The backend mechanism: order of choice, objections, errors."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

import kernelpose
from kernelpose import _native
from kernelpose.backend import BACKENDS, OPS, choose, why_not

QKV = torch.zeros(1, 8, 8, 24)
WINDOWED: dict[str, Any] = {"num_heads": 2, "window": (4, 4)}


def test_every_op_answers_for_every_backend() -> None:
    assert OPS
    for spec in OPS.values():
        inputs, options = spec.example(torch.device("cpu"), torch.float32)
        answers = {name: why_not(spec.name, name, *inputs, **options) for name in BACKENDS}
        assert answers["eager"] is None
        for reason in filter(None, answers.values()):
            assert reason[0] != reason[0].upper() or reason.split()[0] in ("Triton", "CUDA")
            assert not reason.endswith(".")


def test_automatic_choice_takes_the_first_without_objection() -> None:
    assert choose("window_attention", None, QKV, **WINDOWED) == "cpu"
    assert choose("window_attention", None, QKV, num_heads=2) == "cpu"
    half = torch.zeros(1, 8, 8, 24, dtype=torch.bfloat16)
    assert choose("window_attention", None, half, num_heads=2) == "torch"
    assert choose("window_attention", None, half.requires_grad_(), num_heads=2) == "cpu"
    assert choose("window_attention", None, QKV.to("meta"), **WINDOWED) == "eager"
    wide = torch.zeros(1, 8, 8, 3 * 256)
    assert choose("window_attention", None, wide, num_heads=1, window=(4, 4)) == "eager"


def test_order_of_choice() -> None:
    with kernelpose.backend("eager"):
        assert choose("window_attention", None, QKV, **WINDOWED) == "eager"
        assert choose("window_attention", "cpu", QKV, **WINDOWED) == "cpu"
        with kernelpose.backend("cpu"):
            assert choose("window_attention", None, QKV, **WINDOWED) == "cpu"
        assert choose("window_attention", None, QKV, **WINDOWED) == "eager"
    with pytest.raises(ZeroDivisionError), kernelpose.backend("eager"):
        1 / 0  # noqa: B018
    assert choose("window_attention", None, QKV, **WINDOWED) == "cpu"


@pytest.mark.parametrize("value", ["eager", "torch"])
def test_environment_variable(value: str, run_python: Any) -> None:
    script = """
import torch, kernelpose
from kernelpose.backend import choose
print(choose("window_attention", None, torch.zeros(1, 8, 8, 24), num_heads=2))
"""
    assert run_python(script, KERNELPOSE_BACKEND=value).strip() == value


def test_a_context_can_be_entered_again() -> None:
    eager = kernelpose.backend("eager")
    with eager, eager:
        pass
    assert choose("window_attention", None, QKV, **WINDOWED) == "cpu"


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80-real,90-real,90-virtual", (8, 6), True),
        ("80-real,90-real,90-virtual", (12, 0), True),
        ("80-real,90-real,90-virtual", (7, 5), False),
        ("90-real", (8, 0), False),
        ("90-real", (10, 0), False),
        ("90", (10, 0), True),
        ("86-real", (8, 0), False),
    ],
)
def test_gpu_that_the_core_has_code_for(
    archs: str, capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "core", types.SimpleNamespace(cuda_archs=archs))
    assert _native.runs_on(capability) is runs


def test_environment_variable_that_names_no_backend(run_python: Any) -> None:
    """Importing goes well, a call that names its backend too; the others say what is wrong."""
    script = """
import torch, kernelpose
def run(**options):
    return kernelpose.ops.window_attention(torch.zeros(1, 4, 4, 24), num_heads=2, **options)
run(backend="eager")
with kernelpose.backend("cpu"):
    run()
try:
    run()
except kernelpose.UserError as error:
    print(error)
"""
    text = run_python(script, KERNELPOSE_BACKEND="fast")
    assert (
        text == "KERNELPOSE_BACKEND is 'fast'; expected one of cuda, triton, cpu, torch, eager.\n"
    )


def test_environment_variable_that_names_no_instruction_set(run_python: Any) -> None:
    script = """
import torch, kernelpose
qkv = torch.zeros(1, 4, 4, 24)
kernelpose.ops.window_attention(qkv, num_heads=2, backend="eager")
for _ in range(2):
    try:
        kernelpose.ops.window_attention(qkv, num_heads=2, backend="cpu")
    except ValueError as error:
        print(error)
"""
    sentence = "KERNELPOSE_CPU_ISA is 'avx3'; expected baseline, avx2 or avx512.\n"
    assert run_python(script, KERNELPOSE_CPU_ISA="avx3") == 2 * sentence
    assert run_python(script, KERNELPOSE_CPU_ISA="") == ""


def test_explicit_choice_raises_with_the_objection() -> None:
    reason = why_not("window_attention", "triton", QKV, **WINDOWED)
    assert reason is not None
    with pytest.raises(kernelpose.BackendError, match="expected one that can run") as caught:
        kernelpose.ops.window_attention(QKV, **WINDOWED, backend="triton")
    assert reason in str(caught.value)
    with pytest.raises(ValueError, match="backend is 'metal'; expected one of cuda, triton"):
        kernelpose.backend("metal")


def test_missing_core_is_said_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = kernelpose.ops.window_attention(torch.ones(1, 8, 8, 24), **WINDOWED)
    monkeypatch.setattr(_native, "core", None)
    reason = why_not("window_attention", "cpu", QKV, **WINDOWED)
    assert reason == ("the native core could not be imported (python -m kernelpose.info shows why)")
    got = kernelpose.ops.window_attention(torch.ones(1, 8, 8, 24), **WINDOWED)
    torch.testing.assert_close(got, expected)


def test_dtype_that_a_backend_does_not_compute() -> None:
    reason = why_not("window_attention", "cpu", QKV.to(torch.float8_e4m3fn), **WINDOWED)
    assert reason == "it does not compute float8_e4m3fn"
