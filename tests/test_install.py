"""The build: what setup.py decides, what the core links to, what a source distribution holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from kernelpose import _native
from tests.conftest import ROOT


def run_setup(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", *args]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


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
    done = run_setup("--version", KERNELPOSE_NO_NATIVE="1")
    assert done.returncode == 0
    assert "*** kernelpose: KERNELPOSE_NO_NATIVE=1: no native kernels" in done.stderr


def test_flag_that_is_neither_0_nor_1() -> None:
    done = run_setup("--version", KERNELPOSE_NO_NATIVE="yes")
    assert done.returncode != 0
    assert "KERNELPOSE_NO_NATIVE is 'yes'; expected 0 or 1." in done.stderr


def test_requiring_cuda_without_nvcc_is_an_error(tmp_path: Path) -> None:
    done = run_setup(
        "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}",
        KERNELPOSE_REQUIRE_CUDA="1", CUDA_HOME=str(tmp_path),
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )  # fmt: skip
    assert done.returncode != 0
    assert "KERNELPOSE_REQUIRE_CUDA=1, but there is no nvcc" in done.stderr


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


def build_tree() -> Path:
    trees = sorted((ROOT / "build").glob("cmake-*"), key=lambda t: t.stat().st_mtime)
    if not trees:
        pytest.skip("the package was not built in this folder")
    return trees[-1]


def test_an_edit_rebuilds_that_file_alone() -> None:
    tree = build_tree()
    ninja = shutil.which("ninja") or Path(sys.executable).parent / "ninja"

    def planned() -> str:
        command = [ninja, "-C", tree, "-n", "-v", "_C"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    if "no work to do" not in planned():
        pytest.skip("sources have changed since the package was built")
    edited = ROOT / "csrc" / "cpu" / "parallel.cpp"
    before = edited.stat()
    try:
        os.utime(edited, (time.time(), time.time()))
        compiled = [line.split(" -c ")[1] for line in planned().splitlines() if " -c " in line]
    finally:
        os.utime(edited, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert compiled == [str(edited)]


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


@pytest.mark.full
def test_sdist_builds_from_itself_and_runs(sdist: Path, tmp_path: Path) -> None:
    """pip, in its own isolated environment, which has no torch."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path, sdist]
    environment = {**os.environ, "KERNELPOSE_CUDA_ARCHS": "90"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    script = """
import torch, kernelpose, kernelpose.triton_kernels
from kernelpose import _native
assert _native.import_error is None, _native.import_error
qkv = torch.randn(1, 8, 8, 48)
out = kernelpose.ops.window_attention(qkv, num_heads=2, window=(4, 4), backend="cpu")
print(kernelpose.__file__, tuple(out.shape))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
