"""The command line as a whole."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest

import kernelpose
from kernelpose import cli
from kernelpose.backend import BackendError
from kernelpose.errors import UserError


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert all(f"    {name} " in output for name in cli.COMMANDS)


def test_help_imports_no_command() -> None:
    code = (
        "import sys; from kernelpose.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "loaded = [m for m in sys.modules if m.split('.')[0] in ('PIL', 'matplotlib')]\n"
        "loaded += [m for m in sys.modules if m.startswith('kernelpose.pipeline')]\n"
        "sys.exit(f'{loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: kernelpose {name}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"kernelpose {kernelpose.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["dance"], ["predict"], ["predict", "a.jpg", "--fast"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (0, 0, ""),
        (1, 1, ""),
        (UserError("the file is odd"), 2, "kernelpose: the file is odd\n"),
        (BackendError("no such device"), 2, "kernelpose: no such device\n"),
        (PermissionError(13, "denied", "a/b"), 2, "kernelpose: a/b cannot be used: denied.\n"),
        (OSError(28, "full"), 2, "kernelpose: a file or a stream cannot be used: full.\n"),
        (KeyboardInterrupt(), 130, "kernelpose: interrupted\n"),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], outcome, code, message
) -> None:
    def run(args):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    module = types.ModuleType("stand_in")
    module.add_arguments, module.run = lambda parser: None, run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setitem(cli.COMMANDS, "stand-in", ("stand_in", "a stand-in"))
    assert cli.main(["stand-in"]) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("module", [["kernelpose", "info"], ["kernelpose.info"]])
@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("KERNELPOSE_BACKEND", "expected one of cuda, triton, cpu, torch, eager."),
        ("KERNELPOSE_CPU_ISA", "expected baseline, avx2 or avx512."),
    ],
)
def test_wrong_environment_variable(variable: str, expected: str, module: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *module],
        env={**os.environ, variable: "nonsense"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"kernelpose: {variable} is 'nonsense'; {expected}\n"


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect is no user's mistake: it must not pass for one."""
    module = types.ModuleType("stand_in")

    def run(args):
        raise ValueError("a defect")

    module.add_arguments, module.run = lambda parser: None, run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setitem(cli.COMMANDS, "stand-in", ("stand_in", "a stand-in"))
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["stand-in"])
