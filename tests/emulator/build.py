"""Compile CUDA sources, unmodified, with g++ against the emulator, under ASan and UBSan."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = HERE / ".build"
CXX = os.environ.get("CXX", "g++")

INCLUDES = [HERE / "include", ROOT / "csrc" / "include", ROOT / "csrc"]
COMMON = ["-std=c++17", "-g1", "-fPIC", "-fmax-errors=3", "-Wall", "-Wextra"]
COMMON += ["-ffp-contract=off", "-Wno-unknown-pragmas"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
RUNTIME_FLAGS = ["-O2"]  # the emulator moves stacks and poisons memory: it is not sanitised itself
HOST_FLAGS = ["-Og", *SANITIZE]
# Checks as calls, so that runtime/races.cpp sees every access to shared memory.
CUDA_FLAGS = [*HOST_FLAGS, "-DKERNELPOSE_EMULATOR"]
CUDA_FLAGS += ["--param", "asan-instrumentation-with-call-threshold=0"]


def library(sources: Sequence[Path], name: str) -> Path:
    """Shared library of CUDA `sources` whose extern "C" functions `run.run` can call."""
    objects = [_object(source, CUDA_FLAGS, ["-x", "c++"]) for source in sources]
    return _link([*objects, *_runtime()], name + ".so")


def extension() -> Path:
    """The module `kernelpose._C` with every CUDA op in it, to be run by the emulator."""
    import pybind11

    python = ["-I", sysconfig.get_path("include"), "-I", pybind11.get_include()]
    defines = ["-DKERNELPOSE_WITH_CUDA", "-DKERNELPOSE_MODULE=emulated"]
    defines += ['-DKERNELPOSE_COMPILER="g++ for the emulator"']
    csrc = ROOT / "csrc"
    # As one, since pybind11 takes longer than they, and not sanitised: they hand over addresses.
    bindings = sorted((csrc / "bindings").glob("*.cpp"))
    units: list[tuple[Path, Sequence[str], Sequence[str], Sequence[Path]]]
    units = [(csrc / "bindings.cpp", ["-O0", *python, *defines], [], bindings)]
    cuda = sorted((csrc / "cuda").glob("*.cu"))
    units += [(source, CUDA_FLAGS, ["-x", "c++"], []) for source in cuda]
    # The CPU's kernels are left out. Nobody calls them here, and child.py binds no earlier.
    units += [(csrc / "cpu" / name, HOST_FLAGS, [], []) for name in ("isa.cpp", "parallel.cpp")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a compiler
        objects = list(pool.map(lambda unit: _object(*unit), units))
    return _link([*objects, *_runtime()], "emulated" + sysconfig.get_config_var("EXT_SUFFIX"))


def asan_library() -> str:
    """Path of the runtime that has to be loaded before everything else."""
    return _output("-print-file-name=libasan.so")


def available() -> str | None:
    """Why sources cannot be compiled here, or None."""
    if shutil.which(CXX) is None:
        return f"no compiler {CXX!r}"
    if not Path(asan_library()).is_absolute():
        return f"{CXX} comes without libasan.so"
    return None


def _runtime() -> list[Path]:
    return [_object(source, RUNTIME_FLAGS) for source in sorted((HERE / "runtime").glob("*.cpp"))]


def _object(
    source: Path, flags: Sequence[str], language: Sequence[str] = (), before: Sequence[Path] = ()
) -> Path:
    """Of a source, with those that come `before` it."""
    includes = [*INCLUDES, source.parent]
    flags = [*COMMON, *flags, *(part for path in includes for part in ("-I", str(path)))]
    flags += [part for path in before for part in ("-include", str(path))]
    headers = {path for include in includes for path in include.rglob("*.*h")}
    contents = (path.read_bytes() for path in [*before, source, *sorted(headers)])
    key = _digest(" ".join(flags).encode(), *contents)
    target = CACHE / f"{source.stem}-{key}.o"
    return _make(target, [CXX, *flags, "-c", *language, str(source)])


def _link(objects: Sequence[Path], file_name: str) -> Path:
    key = _digest(*(path.name.encode() for path in objects))
    target = CACHE / key / file_name  # an extension module's file must bear the module's name
    return _make(
        target, [CXX, "-shared", *SANITIZE, "-Wl,-Bsymbolic,-z,lazy", *map(str, objects), "-ldl"]
    )


def _make(target: Path, command: Sequence[str]) -> Path:
    """Run `command -o target` unless its result is cached; the target appears whole or not.

    Another process that wants the same target waits for it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            os.utime(target)
            return target
        _prune()
        beside = target.with_name(f".{target.name}")
        done = subprocess.run([*command, "-o", str(beside)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")
        beside.replace(target)
    return target


def _prune(days: float = 7) -> None:
    """Delete what nobody has asked for in a week."""
    for path in CACHE.rglob("*"):
        if path.is_file() and path.stat().st_mtime < time.time() - days * 86400:
            path.unlink(missing_ok=True)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256(_output("-dumpfullversion").encode())
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


_answers: dict[str, str] = {}


def _output(option: str) -> str:
    if option not in _answers:
        done = subprocess.run([CXX, option], capture_output=True, text=True, check=True)
        _answers[option] = done.stdout.strip()
    return _answers[option]
