"""Where the kernels of an op meet, so that a test can leave out one place at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.emulator.build import ROOT
from tests.emulator.run import Call, EmulatorError, run, same

Right = Sequence[tuple[Call, list[Any]]]  # calls, and what they leave when nothing is left out


def barriers(op: str, *names: str) -> list[str]:
    """file:line of every call of the primitives `names` in the op's sources and what they include.

    Each can be left out of a run: Call(..., settings={"skip": barrier}).
    """
    call = re.compile(rf"\b({'|'.join(names)})(<\w+>)?\(")
    paths = found = {*(ROOT / "csrc" / "cuda").glob(f"{op}*.cu*")}
    while found := {header for path in found for header in _included(path)} - paths:
        paths = paths | found
    return [
        f"{path.name}:{number}"
        for path in sorted(paths)
        if path.name != "ptx.cuh"  # defines them
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if call.search(line.split("//")[0])
    ]


def check_removal(barrier: str, module: Path, right: Right, seeds: Sequence[int] = (0,)) -> None:
    """Without the barrier some call is reported, or leaves something else in its arguments."""
    for call, after in right:
        calls = [Call(call.function, call.args, {"seed": s, "skip": barrier}) for s in seeds]
        try:
            results = run(module, calls)
        except EmulatorError:
            return
        if not all(same(result.args, after) for result in results):
            return
    pytest.fail(f"no case needs the barrier at {barrier}")


def _included(path: Path) -> set[Path]:
    """The shared headers that a source names."""
    shared = ROOT / "csrc" / "include" / "kernelpose"
    names = re.findall(r'#include "(?:kernelpose/)?(\w+\.cuh)"', path.read_text())
    return {shared / name for name in names if (shared / name).is_file()}
