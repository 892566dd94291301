"""`python -m kernelpose.info [--json]`: what is installed, what was built, what runs what."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch

import kernelpose
from kernelpose import _native
from kernelpose.backend import BACKENDS, OPS, choose, why_not

PACKAGES = ("torch", "triton", "numpy", "pillow", "matplotlib", "pycocotools", "tqdm")


def collect() -> dict[str, Any]:
    """Everything that `info` prints, as JSON types.

    ops: for each op and device type, the backend that would run its example and, for each other
    one, why it would not ("behind <chosen>" where it only comes later in the order).
    """
    core = _native.core
    return {
        "kernelpose": kernelpose.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        # With its build: the registry's metadata of 2.11.0+cu130 says 2.11.0.
        "packages": {name: _version(name) for name in PACKAGES} | {"torch": str(torch.__version__)},
        "gpu": _gpu(),
        "core": None
        if core is None
        else {
            "compiler": core.compiler,
            "cpu_instructions": core.cpu_isa(),
            "cpu_threads": torch.get_num_threads(),
            "cpu_threads_by": core.cpu_threads_by(),
            "cuda_archs": core.cuda_archs or None,
        },
        "core_import_error": _native.import_error,
        "ops": {name: {d: _op_on(name, d) for d in _devices()} for name in OPS},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch_cuda": torch.version.cuda,
    }


def _op_on(op: str, device: str) -> dict[str, Any]:
    inputs, options = OPS[op].example(torch.device(device), torch.float32)
    try:
        chosen = choose(op, None, *inputs, **options)
    except kernelpose.BackendError as error:  # KERNELPOSE_BACKEND names one that cannot
        return {"runs": None, "why_not": {"all": str(error)}}
    reasons = {
        name: why_not(op, name, *inputs, **options) or f"behind {chosen} in the order"
        for name in BACKENDS
        if name != chosen
    }
    return {"runs": chosen, "why_not": reasons}


def _text(info: dict[str, Any]) -> str:
    lines = [f"kernelpose {info['kernelpose']}, Python {info['python']}, {info['platform']}"]
    versions = [f"{name} {version or '-'}" for name, version in info["packages"].items()]
    lines.append("packages     " + ", ".join(versions))
    gpu = info["gpu"]
    lines.append(
        "GPU          none that torch sees"
        if gpu is None
        else f"GPU          {gpu['name']}, sm_{gpu['compute_capability'].replace('.', '')}, "
        f"{gpu['memory_gib']} GiB, torch built for CUDA {gpu['torch_cuda']}"
    )
    core = info["core"]
    if core is None:
        lines += ["native core  could not be imported:", info["core_import_error"].rstrip()]
    else:
        lines.append(f"native core  {core['compiler']}, CUDA {core['cuda_archs'] or 'not built'}")
        lines.append(
            f"CPU kernels  {core['cpu_instructions']}, {core['cpu_threads']} threads by "
            f"{core['cpu_threads_by']}"
        )
    for op, devices in info["ops"].items():
        for device, answer in devices.items():
            lines.append(f"\n{op} on {device}: {answer['runs'] or 'nothing'} runs its example")
            lines += [f"  {name:7} {reason}" for name, reason in answer["why_not"].items()]
    return "\n".join(lines)


def backend_table() -> str:
    """The README's table of op × backend × dtype, in Markdown, from the registry."""
    short = {
        torch.float64: "f64",
        torch.float32: "f32",
        torch.float16: "f16",
        torch.bfloat16: "bf16",
        torch.uint8: "u8",
    }
    lines = [
        "| op | " + " | ".join(f"`{name}`" for name in BACKENDS) + " |",
        "| --- " * (len(BACKENDS) + 1) + "|",
    ]
    for spec in OPS.values():
        cells = []
        for name in BACKENDS:
            dtypes = [short[d] for d in spec.dtypes.get(name, ())]
            cells.append(" ".join(dtypes) + f" {spec.directions}" if dtypes else "–")
        lines.append(f"| `{spec.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    info = collect()
    print(json.dumps(info, indent=2) if args.json else _text(info))
    return 0


if __name__ == "__main__":
    from kernelpose.cli import main

    raise SystemExit(main(["info", *sys.argv[1:]]))
