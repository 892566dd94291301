"""What `python -m kernelpose.info` says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from kernelpose import _native, info
from kernelpose.backend import BACKENDS, OPS


def test_json_in_a_process_of_its_own(run_python: Any) -> None:
    script = (
        "import runpy, sys\n"
        "sys.argv = ['info', '--json']\n"
        "runpy.run_module('kernelpose.info', run_name='__main__')"
    )
    told = json.loads(run_python(script))
    assert told["packages"]["torch"] == torch.__version__
    assert set(told["ops"]) == set(OPS)
    for devices in told["ops"].values():
        for answer in devices.values():
            assert {answer["runs"], *answer["why_not"]} == set(BACKENDS)
    assert told["core"]["cpu_threads_by"].startswith("GOMP_parallel of ")
    assert told["core_import_error"] is None


def test_import_error_is_shown_in_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_native, "core", None)
    monkeypatch.setattr(_native, "import_error", "Traceback\nImportError: libmissing.so.1")
    parser = __import__("argparse").ArgumentParser()
    info.add_arguments(parser)
    assert info.run(parser.parse_args([])) == 0
    text = capsys.readouterr().out
    assert "could not be imported:\nTraceback\nImportError: libmissing.so.1" in text
    assert "window_attention on cpu: eager runs its example" in text
