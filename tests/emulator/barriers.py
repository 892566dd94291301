"""Where the kernels of an op meet, so that a test can leave out one place at a time."""

from __future__ import annotations

import re
from pathlib import Path

from tests.emulator.build import ROOT


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


def _included(path: Path) -> set[Path]:
    """The shared headers that a source names."""
    shared = ROOT / "csrc" / "include" / "kernelpose"
    names = re.findall(r'#include "(?:kernelpose/)?(\w+\.cuh)"', path.read_text())
    return {shared / name for name in names if (shared / name).is_file()}
