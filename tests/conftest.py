"""What every test may use: the shared data, the slow marker, poisoned allocations."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# Triton chooses between compiling and interpreting its own functions when it is first imported,
# which parts of torch do while tests are collected: so here, before all of them.
with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ImportError):
    if not torch.cuda.is_available():
        patch.setenv("TRITON_INTERPRET", "1")
    import triton  # noqa: F401


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the golden data and the sample photographs, which are not part of the project."""
    path = Path(os.environ.get("KERNELPOSE_SHARED", ROOT.parent / "shared"))
    if not (path / "golden").is_dir():
        pytest.skip(f"no golden data at {path}; KERNELPOSE_SHARED names its folder")
    return path


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty, new_empty and empty_like give NaN, so that an element nobody writes shows."""

    def poison(function: Any) -> Any:
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return filled

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    yield


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Runs a script in a process of its own, with environment variables; gives what it prints."""

    def run(script: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the slow matrices as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        slow = [item for item in items if item.get_closest_marker("full")]
        if slow:
            config.hook.pytest_deselected(items=slow)
            items[:] = [item for item in items if item not in set(slow)]
    # Of files run side by side, those of few tests, which build or start processes, come first:
    # at the end one core would wait for them.
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: tests[item.path])
