"""Where a figure was measured: device, versions, commit, and the machine's roof in that run."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import time_all
from kernelpose import info

ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions and commit, as JSON types."""
    told = info.collect()
    if told["core"] is not None:  # the runtime's name, not where this machine keeps it
        told["core"]["cpu_threads_by"] = told["core"]["cpu_threads_by"].rsplit("/", 1)[-1]
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        **{key: told[key] for key in ("kernelpose", "python", "platform", "packages", "core")},
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    fields = [re.search(rf"^{key}\s*: (.*)$", text, re.M) for key in ("model name", "model")]
    name, model = (f.group(1).strip() if f else "" for f in fields)
    return f"{name} model {model}" if name else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def roof(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second of a large copy and FLOP a second of a large matrix product, measured now."""
    gpu = device.type == "cuda"
    elements = 2**30 // 4 if gpu else 2**27 // 4
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    n = 8192 if gpu else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    c = torch.empty_like(a)
    with torch.no_grad():
        times = time_all(
            {
                "copy": [lambda: target.copy_(source)],
                "matmul": [lambda: torch.matmul(a, b, out=c)],
            },
            device,
        )
    return {
        "bytes_per_second": 2 * 4 * elements / times["copy"].median,
        "flops_per_second": 2 * n**3 / times["matmul"].median,
    }
