"""Compiles Triton kernels without a GPU and prints what they use, as JSON lines.

Reads lists of variants from standard input, each a line of JSON. Run in a process of its own:
Triton compiles, or interprets, for the life of a process.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MAPS = {"qkv", "pooled", "out", "grad_out", "grad_qkv"}  # of the tensor's dtype
FLOATS = {"bias", "lse", "delta", "grad_pooled", "partial", "pairs", "grad_bias"}


def compile_variant(
    name: str,
    dtype: str,
    arch: int,
    constants: dict[str, Any],
    options: dict[str, Any],
    module: str,
    types: dict[str, str] | None = None,
) -> dict[str, int]:
    """Registers a thread, bytes of stack and local memory a thread, shared bytes a block.

    types: Triton's types of the parameters that are neither constants nor i32; by default those of
    window_attention's kernels.
    """
    kernel = getattr(importlib.import_module(f"kernelpose.triton_kernels.{module}"), name)
    if types is None:
        types = dict.fromkeys(MAPS, "*" + dtype) | dict.fromkeys(FLOATS, "*fp32")
        types["scale"] = "fp32"
    signature, constexprs, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        key = parameter.name
        if parameter.is_constexpr or constants.get(key, 0) is None:
            signature[key] = "constexpr"
            constexprs[(i,)] = constants[key]
            if isinstance(constants[key], list):  # JSON knows no tuple
                constexprs[(i,)] = tuple(constants[key])
        else:
            signature[key] = types.get(key, "i32")
            if signature[key].startswith("*"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "spilled": stack + local, "shared": compiled.metadata.shared}


if __name__ == "__main__":
    for line in sys.stdin:
        for variant in json.loads(line):
            print(json.dumps(compile_variant(**variant)), flush=True)
