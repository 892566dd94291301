"""Ahead-of-time compiles of Triton kernels in a process of their own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("compile_kernels.py")


def compile_all(variants: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
    """What `compile_kernels.compile_variant` says of each variant, a dict of its arguments."""
    compiler, errors = _compiler()
    assert compiler.stdin is not None and compiler.stdout is not None
    print(json.dumps(variants), file=compiler.stdin, flush=True)
    lines = [compiler.stdout.readline() for _ in variants]
    if not all(lines):
        _compiler.cache_clear()
        compiler.wait()
        errors.seek(0)
        raise AssertionError(errors.read()[-4000:])
    return [json.loads(line) for line in lines]


@functools.cache
def _compiler() -> tuple[subprocess.Popen[str], IO[str]]:
    """For all tests, as its imports take longer than most compiles; and where its errors go."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    return process, errors
