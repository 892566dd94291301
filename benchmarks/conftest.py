"""The benchmark session: device, contenders to leave out, and the report at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest
import torch

from benchmarks.both_ways import compare_both_ways  # noqa: F401  # a fixture
from benchmarks.forward import compare  # noqa: F401  # a fixture
from benchmarks.report import Report
from benchmarks.rows import Row

_REPORT = pytest.StashKey[Report]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--benchmark"):
        for item in items:
            item.add_marker(pytest.mark.skip(reason="benchmarks run with `pytest --benchmark`"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The GPU where there is one, else the CPU with `--threads` threads."""
    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        yield torch.device("cuda", 0)
    else:
        count = request.config.getoption("--threads")
        torch.set_num_threads(count)
        cv2.setNumThreads(count)  # what the plain path runs on
        yield torch.device("cpu")
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def compiles(request: pytest.FixtureRequest) -> bool:
    """Whether torch.compile is among the contenders."""
    return not request.config.getoption("--no-compile")


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest, device: torch.device) -> Report:
    """Collects the rows; what it holds is printed, saved and drawn when the session ends."""
    made = Report(device, Path(request.config.getoption("--results")))
    request.config.stash[_REPORT] = made
    return made


@pytest.fixture
def record(report: Report, benchmark: object) -> object:
    """record(row): keep a row; its chosen contender's median also goes to pytest-benchmark."""

    def keep(row: Row) -> None:
        report.rows.append(row)
        benchmark.extra_info.update(row.as_json())  # type: ignore[attr-defined]

    return keep


def pytest_terminal_summary(terminalreporter: object, config: pytest.Config) -> None:
    report = config.stash.get(_REPORT, None)
    if report is None or not report.rows:
        return
    write = terminalreporter.write_line  # type: ignore[attr-defined]
    for line in report.table():
        write(line)
    for path in report.save():
        write(f"saved {path}")
