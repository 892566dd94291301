"""What ptxas says of every CUDA kernel, against the budgets that stand beside the kernels.

A budget is a comment in csrc/cuda, `// budget: kernel<arguments> registers<=N`. Among the
arguments, `16-bit` stands for __half and __nv_bfloat16, `*` for anything. Spills, stack frames and
static shared memory have no budget: none are allowed. What a kernel asks for at launch is bounded
by a static_assert beside it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHS = (80, 90)

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None or shutil.which("c++filt") is None, reason="nvcc is not installed"
)


@dataclass(frozen=True)
class Usage:
    kernel: str  # as in a budget: forward_kernel<16-bit, 64>
    registers: int
    stack: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Budget:
    pattern: str
    registers: int


def parse_budgets(text: str) -> list[Budget]:
    lines = re.findall(r"^// budget: (.+) registers<=(\d+)$", text, re.MULTILINE)
    return [Budget(pattern, int(registers)) for pattern, registers in lines]


def parse_report(report: str) -> list[Usage]:
    """Usage of each kernel in the demangled output of `ptxas -v`."""
    result = []
    for part in report.split("Compiling entry function ")[1:]:
        name = re.match(r"'(?:void )?(.*)' for 'sm_", part)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert name and frame and registers, f"ptxas reports in an unknown form: {part}"
        shared = re.search(r"(\d+) bytes smem", part)
        stack, stores, loads = map(int, frame.groups())
        kernel = _short(name.group(1))
        usage = Usage(
            kernel, int(registers[1]), stack, stores + loads, int(shared[1]) if shared else 0
        )
        result.append(usage)
    return result


def _short(name: str) -> str:
    """Without return type, parameters and namespaces; the 16-bit types as one."""
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name)
    name = re.sub(r"\(\w+\)(?=\d)", "", name)  # (Pass)2: an enumerator
    name = re.sub(r"\((?:(?!>\().)*\)$", "", name)
    return re.sub(r"__half|__nv_bfloat16", "16-bit", name)


def violations(usages: list[Usage], budgets: list[Budget]) -> list[str]:
    found = []
    for usage in usages:
        limits = [b.registers for b in budgets if fnmatch(usage.kernel, b.pattern)]
        if len(limits) != 1:
            found.append(f"{usage.kernel} has {len(limits)} budgets, needs one")
        elif usage.registers > limits[0]:
            found.append(f"{usage.kernel} uses {usage.registers} registers, may use {limits[0]}")
        for field in ("stack", "spills", "shared"):
            if getattr(usage, field):
                found.append(f"{usage.kernel} has {getattr(usage, field)} bytes of {field}")
    return found


def budgets_of(source: Path) -> list[Budget]:
    """Those of a source and of its own headers, which may share a name with another's kernels."""
    text = source.read_text()
    headers = (CSRC / "cuda" / name for name in re.findall(r'#include "(\w+\.cuh)"', text))
    return parse_budgets(text) + [budget for header in headers for budget in budgets_of(header)]


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Path:
    """Where the reports that the chosen tests need are kept; compiled on all cores at once."""
    folder = Path(request.config.cache.mkdir("ptxas"))
    wanted = [
        (item.callspec.params["source"], item.callspec.params["arch"])
        for item in request.session.items
        if item.module is request.module and "arch" in getattr(item, "fixturenames", ())
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a compiler
        list(pool.map(lambda unit: compile_report(*unit, folder), wanted))
    return folder


def compile_report(source: Path, arch: int, folder: Path) -> str:
    """Demangled `ptxas -v` of one source, kept by the hash of all that it may be made from."""
    files = sorted((CSRC / "include").rglob("*.*h")) + sorted((CSRC / "cuda").glob("*.*h"))
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    digest = hashlib.sha256(version.stdout.encode())
    for file in [*files, source]:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    kept = folder / f"{source.stem}-sm_{arch}-{digest.hexdigest()[:16]}.txt"
    if not kept.exists():
        command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", f"-I{CSRC}", f"-I{CSRC}/include"]
        command += [
            "-cubin",
            f"-arch=sm_{arch}",
            "-o",
            str(kept.with_suffix(".cubin")),
            str(source),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        kept.with_suffix(".cubin").unlink()
        text = subprocess.run(
            ["c++filt"], input=done.stderr, capture_output=True, text=True, check=True
        ).stdout
        beside = kept.with_suffix(f".{os.getpid()}")
        beside.write_text(text)
        beside.replace(kept)
    return kept.read_text()


@pytest.mark.full  # minutes of nvcc
@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_kernels_keep_their_budgets(source: Path, arch: int, reports: Path) -> None:
    usages = parse_report(compile_report(source, arch, reports))
    assert usages
    assert not violations(usages, budgets_of(source))


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void kernelpose::cuda::(anonymous namespace)::\
forward_kernel<__half, 64>(kernelpose::cuda::(anonymous namespace)::Arguments<__half>)' for 'sm_90'
ptxas info    : Function properties for forward_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 150 registers, used 1 barriers
ptxas info    : Compiling entry function 'void kernelpose::cuda::backward_kernel<float, 32, \
(kernelpose::cuda::Pass)2>(kernelpose::cuda::Arguments<float>)' for 'sm_90'
ptxas info    : Function properties for backward_kernel
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 8 bytes cumulative stack size
ptxas info    : Compiling entry function 'sum(float const*, int)' for 'sm_90'
ptxas info    : Function properties for sum
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 1 barriers, 1024 bytes smem
"""


def test_reports_and_budgets_are_read() -> None:
    assert parse_report(REPORT) == [
        Usage("forward_kernel<16-bit, 64>", 150, 0, 0, 0),
        Usage("backward_kernel<float, 32, 2>", 168, 8, 8, 0),
        Usage("sum", 20, 0, 0, 1024),
    ]
    text = "// budget: forward_kernel<16-bit, *> registers<=160\n// budget: sum registers<=16\n"
    assert violations(parse_report(REPORT), parse_budgets(text)) == [
        "backward_kernel<float, 32, 2> has 0 budgets, needs one",
        "backward_kernel<float, 32, 2> has 8 bytes of stack",
        "backward_kernel<float, 32, 2> has 8 bytes of spills",
        "sum uses 20 registers, may use 16",
        "sum has 1024 bytes of shared",
    ]
