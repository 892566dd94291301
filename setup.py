"""Builds the native core with CMake and Ninja. Never imports torch, never asks for a GPU.

KERNELPOSE_CUDA_ARCHS   architectures for nvcc, such as "80;90" (default: sm_80, sm_90 and PTX)
KERNELPOSE_REQUIRE_CUDA=1   no nvcc is an error
KERNELPOSE_NO_NATIVE=1      pure Python: Triton and eager only
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def flag(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise SystemExit(f"{name} is {value!r}; expected 0 or 1.")
    return value == "1"


def say(message: str) -> None:
    """One line that pip's captured output and a terminal both keep."""
    print(f"\n*** kernelpose: {message} ***\n", file=sys.stderr, flush=True)


def run(*command: str | Path) -> None:
    if subprocess.run(command).returncode != 0:
        raise SystemExit("kernelpose: the native core did not build; the compiler says why above.")


def find_tool(name: str) -> str:
    """The program that pip installed for this build; without one, the PATH's.

    The same command then builds with the same tools whatever the PATH: Ninja builds everything
    again where another version of it kept the log.
    """
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        program = Path(str(file.locate())).resolve()
        if file.stem == name and file.parent.name in ("bin", "Scripts") and program.is_file():
            return str(program)
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"kernelpose: building needs {name}; pip installs it.")
    return found


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME; where that is unset, the one on the PATH or in its usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not home and shutil.which("nvcc"):
        return shutil.which("nvcc")
    nvcc = Path(home or "/usr/local/cuda") / "bin" / "nvcc"
    return str(nvcc) if nvcc.is_file() else None


def cmake_archs(text: str) -> str:
    """'80;90' or '8.0,9.0' or '80-real 90' as CMake spells it."""
    archs = text.replace(",", " ").replace(";", " ").split()
    return ";".join(arch.replace(".", "") for arch in archs)


class CMakeBuild(build_ext):
    """`build_ext` through one persistent CMake tree, so that an edit rebuilds what it touches."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        tree = ROOT / "build" / f"cmake-{platform}"
        tree.mkdir(parents=True, exist_ok=True)
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        nvcc = find_nvcc()
        if nvcc is None and flag("KERNELPOSE_REQUIRE_CUDA"):
            raise SystemExit("kernelpose: KERNELPOSE_REQUIRE_CUDA=1, but there is no nvcc.")
        options = [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DKERNELPOSE_CUDA={'ON' if nvcc else 'OFF'}",
        ]
        if nvcc:
            options.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
            options.append("-UKERNELPOSE_CUDA_ARCHS")
            if os.environ.get("KERNELPOSE_CUDA_ARCHS"):
                archs = cmake_archs(os.environ["KERNELPOSE_CUDA_ARCHS"])
                options[-1] = f"-DKERNELPOSE_CUDA_ARCHS={archs}"
        else:
            say("no nvcc found: building the CPU kernels only (GPUs get Triton)")
        run(cmake, "-S", ROOT, "-B", tree, "-G", "Ninja", *options)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        run(cmake, "--build", tree, "--target", "_C", "--parallel", jobs)
        built = next(tree.glob(f"_C*{sysconfig.get_config_var('EXT_SUFFIX')}"))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        shutil.copy2(built, partial)
        partial.replace(target)


if flag("KERNELPOSE_NO_NATIVE"):
    say("KERNELPOSE_NO_NATIVE=1: no native kernels, Triton and eager only")
    setup()
else:
    setup(ext_modules=[Extension("kernelpose._C", [])], cmdclass={"build_ext": CMakeBuild})
