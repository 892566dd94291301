"""Call functions of an emulated library in a process that runs under the sanitizers.

The calling process stays clean: tensors travel through files, references are computed outside.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import build

CHILD = Path(__file__).with_name("child.py")


class EmulatorError(Exception):
    """The emulator or a sanitizer stopped the process; the text is its report."""


@dataclass
class Call:
    """One call: tensors go in as pointers to copies, numbers as they are, lists of either as lists.

    `settings` are the emulator's environment variables less their prefix: {"seed": 1}.
    """

    function: str
    args: Sequence[Any]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """What the function returned, and for each tensor argument its contents afterwards."""

    value: Any
    args: list[Any]


def run(library: Path, calls: Sequence[Call], timeout: int = 300) -> list[Result]:
    """Run `calls` one after another in one process; EmulatorError if any of them is stopped."""
    process = _child(library)
    assert process.stdin is not None and process.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        given, answer, report = (Path(folder, name) for name in ("calls", "results", "report"))
        given.write_bytes(pickle.dumps([_encode(call) for call in calls]))
        request = json.dumps([str(given), str(answer), str(report), timeout])
        print(request, file=process.stdin, flush=True)
        status = process.stdout.readline()
        assert status, f"{library} does not load"
        if int(status) != 0:
            raise EmulatorError(report.read_text().strip())
        results = pickle.loads(answer.read_bytes())
    return [
        Result(value, [_tensor(a, b) for a, b in zip(call.args, arrays, strict=True)])
        for call, (value, arrays) in zip(calls, results, strict=True)
    ]


@functools.cache
def _child(library: Path) -> subprocess.Popen[str]:
    """One for all calls: to load the library takes longer than most of them."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("KERNELPOSE_EMULATOR_")}
    env |= {
        "LD_PRELOAD": build.asan_library(),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, str(CHILD), str(library)]
    return subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether the tensors among two calls' arguments are the same, bit for bit, NaN as well."""
    return all(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(left, right, strict=True)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
    )


def _encode(call: Call) -> tuple[str, list[Any], dict[str, str]]:
    settings = {f"KERNELPOSE_EMULATOR_{k.upper()}": str(v) for k, v in call.settings.items()}
    return call.function, [_array(a) for a in call.args], settings


def _array(given: Any) -> Any:
    """A tensor as numpy knows it: bfloat16 by its bits. A list by its elements."""
    if isinstance(given, list):
        return [_array(g) for g in given]
    if not isinstance(given, Tensor):
        return given
    tensor = given.detach().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _tensor(given: Any, array: Any) -> Any:
    if isinstance(given, list):
        return [_tensor(*pair) for pair in zip(given, array, strict=True)]
    return torch.from_numpy(array).view(given.dtype) if isinstance(given, Tensor) else array
