"""The build: what setup.py decides, what the core links to, what a source distribution holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from typing import Any

import pytest

from kernelpose import _native
from tests.conftest import ROOT

TINY = {
    "bindings.cpp": "",
    "used.h": "#pragma once\n",
    "cpu/isa.cpp": "",
    "cpu/parallel.cpp": "",
    "cpu/plain.cpp": "",
    "cpu/user.cpp": '#include "used.h"\n',
    "cuda/plain.cu": "",
    "cuda/user.cu": '#include "used.h"\n',
}


def run_setup(folder: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *args],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Our setup.py and CMakeLists.txt over sources that compile in no time."""
    for name in ("setup.py", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name, text in TINY.items():
        file = tmp_path / "csrc" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def build(folder: Path, **environment: str) -> set[str]:
    """Builds the core of `folder`; gives the names of the sources that were compiled."""

    def objects() -> set[tuple[str, int]]:
        files = (folder / "build").glob("cmake-*/CMakeFiles/*.dir/csrc/**/*.o")
        return {(str(file), file.stat().st_mtime_ns) for file in files}

    before = objects()
    done = run_setup(folder, "build_ext", "--build-lib=lib", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((folder / "lib" / "kernelpose").glob("_C*.so"))
    return {Path(file).stem for file, _ in objects() - before}


def test_setup_does_not_import_torch() -> None:
    code = (
        "import sys, setuptools; setuptools.setup = lambda **_: None; exec(open('setup.py').read())"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"__file__ = 'setup.py'; {code}; print('torch' in sys.modules)"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False"], done.stderr


def test_no_native_is_said_loudly() -> None:
    done = run_setup(ROOT, "--version", KERNELPOSE_NO_NATIVE="1")
    assert done.returncode == 0
    assert "*** kernelpose: KERNELPOSE_NO_NATIVE=1: no native kernels" in done.stderr


def test_flag_that_is_neither_0_nor_1() -> None:
    done = run_setup(ROOT, "--version", KERNELPOSE_NO_NATIVE="yes")
    assert done.returncode != 0
    assert "KERNELPOSE_NO_NATIVE is 'yes'; expected 0 or 1." in done.stderr


def test_requiring_cuda_without_nvcc_is_an_error(tiny: Path) -> None:
    done = run_setup(tiny, "build_ext", KERNELPOSE_REQUIRE_CUDA="1", CUDA_HOME=str(tiny))
    assert done.returncode != 0
    assert done.stderr.splitlines() == [
        "kernelpose: KERNELPOSE_REQUIRE_CUDA=1, but there is no nvcc."
    ]


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "cuda"])
def test_an_edit_rebuilds_that_file_alone(cuda: bool, tiny: Path) -> None:
    if cuda and shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    nvcc = {"CUDA_HOME": "" if cuda else str(tiny), "CUDA_PATH": "", "KERNELPOSE_CUDA_ARCHS": "9.0"}
    suffixes = (".cpp", ".cu") if cuda else (".cpp",)
    everything = {Path(name).name for name in TINY if name.endswith(suffixes)}
    assert build(tiny, **nvcc) == everything
    assert build(tiny, **nvcc) == set()
    for edited, users in {
        "cpu/plain.cpp": {"plain.cpp"},
        "cuda/plain.cu": {"plain.cu"} & everything,
        "used.h": {"user.cpp", "user.cu"} & everything,
    }.items():
        with (tiny / "csrc" / edited).open("a") as file:
            file.write("// edited\n")
        assert build(tiny, **nvcc) == users, edited
    commands = next(tiny.glob("build/cmake-*/compile_commands.json")).read_text()
    assert ("arch=compute_90,code=" in commands) == cuda


def test_tools_that_pip_installed_come_before_those_of_the_path(tiny: Path) -> None:
    """Another version of Ninja would begin again: it cannot read the log of what was built."""
    for name in ("cmake", "ninja"):
        pytest.importorskip(name)
        decoy = tiny / "bin" / name
        decoy.parent.mkdir(exist_ok=True)
        decoy.write_text("#!/bin/sh\nexit 1\n")
        decoy.chmod(0o755)
    path = f"{tiny / 'bin'}{os.pathsep}{os.environ['PATH']}"
    assert "plain.cpp" in build(tiny, CUDA_HOME=str(tiny), PATH=path)


def core_file() -> Path:
    assert _native.core is not None, _native.import_error
    assert _native.core.__file__ is not None
    return Path(_native.core.__file__)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ldd is Linux's")
def test_core_links_neither_torch_nor_cudart_nor_openmp() -> None:
    linked = subprocess.run(["ldd", core_file()], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" in linked
    for name in ("torch", "c10", "cudart", "libgomp", "libiomp"):
        assert name not in linked


def test_core_loads_without_torch(run_python: Any) -> None:
    script = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("kernelpose._C", {str(core_file())!r})
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
print(core.cpu_isa(), core.cpu_threads_by(), "torch" in sys.modules)
"""
    isa, threads, torch_there = run_python(script).split()
    assert isa in ("baseline", "avx2", "avx512") and threads == "std::thread"
    assert torch_there == "False"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("kernelpose-*.tar.gz"))


def test_sdist_holds_all_that_git_does(sdist: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {f for f in listed.stdout.split() if not f.endswith(".gitignore")}
    assert wanted - held == set()
    assert not [f for f in held if f.endswith((".so", ".o", ".stamp", ".pyc"))]


def install(sdist: Path, folder: Path, *options: str, **environment: str) -> str:
    """pip's account of installing `sdist` into `folder`."""
    command = [sys.executable, "-m", "pip", "-v", "install", "--no-deps", "--target", str(folder)]
    done = subprocess.run(
        [*command, *options, str(sdist)],
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def chosen(folder: Path) -> str:
    """The backend that the package in `folder` chooses for a window on a CPU, having run it."""
    script = """
import torch, kernelpose, kernelpose.triton_kernels
from kernelpose import ops
from kernelpose.backend import choose
qkv, options = torch.randn(1, 8, 8, 48), {"num_heads": 2, "window": (4, 4)}
out, exact = (ops.window_attention(qkv, **options, backend=b) for b in (None, "eager"))
torch.testing.assert_close(out, exact)
print(kernelpose.__file__, choose("window_attention", None, qkv, **options))
"""
    packages = sysconfig.get_path("purelib")  # without its .pth files: an editable core is in one
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=folder,
        env={**os.environ, "KERNELPOSE_BACKEND": "", "PYTHONPATH": packages},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    file, name = done.stdout.split()
    assert Path(file).is_relative_to(folder)
    return name


def test_without_the_core_the_package_computes_eagerly(sdist: Path, tmp_path: Path) -> None:
    install(sdist, tmp_path, "--no-build-isolation", KERNELPOSE_NO_NATIVE="1")
    assert not list(tmp_path.rglob("*.so"))
    assert chosen(tmp_path) == "eager"


@pytest.mark.full
def test_sdist_builds_from_itself_and_runs(sdist: Path, tmp_path: Path) -> None:
    """In the environment that pip makes for it, which has no torch."""
    account = install(sdist, tmp_path, KERNELPOSE_CUDA_ARCHS="90")
    installed = " ".join(re.findall(r"Successfully installed (.+)", account)).split()
    names = {item.rsplit("-", 1)[0] for item in installed}
    assert names == {"setuptools", "cmake", "ninja", "pybind11", "kernelpose"}
    assert chosen(tmp_path) == "cpu"
