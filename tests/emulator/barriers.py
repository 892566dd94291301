"""Where the kernels of an op meet, so that a test can leave out one place at a time."""

from __future__ import annotations

import re

from tests.emulator.build import ROOT


def barriers(op: str, *names: str) -> list[str]:
    """file:line of every call of the primitives `names` in the op's sources and shared headers.

    Each can be left out of a run: Call(..., settings={"skip": barrier}).
    """
    call = re.compile(rf"\b({'|'.join(names)})(<\w+>)?\(")
    paths = [*(ROOT / "csrc" / "cuda").glob(f"{op}*.cu*")]
    paths += [*(ROOT / "csrc" / "include" / "kernelpose").glob("*.cuh")]
    return [
        f"{path.name}:{number}"
        for path in sorted(paths)
        if path.name != "ptx.cuh"  # defines them
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if call.search(line.split("//")[0])
    ]
