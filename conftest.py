"""`pytest --benchmark` runs benchmarks/ in place of the tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernelpose benchmarks")
    group.addoption("--benchmark", action="store_true", help="run the benchmarks, not the tests")
    group.addoption(
        "--threads", type=int, default=1, help="threads of the CPU benchmarks (default: 1)"
    )
    group.addoption(
        "--results",
        default="benchmarks/results",
        help="folder of the JSON and the chart; write --results=DIR (default: benchmarks/results)",
    )
    group.addoption(
        "--no-compile", action="store_true", help="leave torch.compile out of the contenders"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark") and config.args_source is not config.ArgsSource.ARGS:
        config.args = [str(config.rootpath / "benchmarks")]
