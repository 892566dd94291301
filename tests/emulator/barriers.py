"""Where the kernels of an op meet, so that a test can leave out one place at a time."""

from __future__ import annotations

import re
from pathlib import Path

from tests.emulator.build import ROOT

_MEETING_POINT = re.compile(r"\b(__syncthreads\w*|__syncwarp|cp_async_commit|cp_async_wait<\w+>)\(")


def barriers(op: str) -> list[str]:
    """file:line of every barrier, and every wait for a copy, in the op's sources and shared headers.

    Any of them can be left out of a run: Call(..., settings={"skip": barrier}).
    """
    paths = [*(ROOT / "csrc" / "cuda").glob(f"{op}*.cu*")]
    paths += [*(ROOT / "csrc" / "include" / "kernelpose").glob("*.cuh")]
    return [
        f"{path.name}:{number}"
        for path in sorted(paths)
        if path.name != "ptx.cuh"  # defines them
        for number, line in enumerate(_lines(path), start=1)
        if _MEETING_POINT.search(line)
    ]


def _lines(path: Path) -> list[str]:
    """Lines of the source less the comments that end them."""
    return [line.split("//")[0] for line in path.read_text().splitlines()]
