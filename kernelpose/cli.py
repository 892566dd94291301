"""The command line: `kernelpose COMMAND ...`."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

from kernelpose import __version__
from kernelpose.backend import BackendError, check_environment
from kernelpose.errors import UserError

# name: module with add_arguments(parser) and run(args) -> exit code, and a line of help. A module
# is imported when its command is the one that runs: what breaks it breaks no other.
COMMANDS = {
    "demo": ("kernelpose.pipeline.demo", "our kernels on one picture: equal to eager, and faster"),
    "predict": ("kernelpose.pipeline.command", "find the joints of people in images"),
    "bench": ("kernelpose.pipeline.bench", "where the time goes, ours against OpenCV and numpy"),
    "convert": ("kernelpose.checkpoints.command", "convert a checkpoint to another layout"),
    "models": ("kernelpose.models.command", "the models, their cost, and what was published"),
    "info": ("kernelpose.info", "versions, devices, and which backend runs what"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what the user can mend is one line on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may not be of its encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="kernelpose", description="Fast pose transformers.")
    parser.add_argument("--version", action="version", version=f"kernelpose {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        if argv[:1] == [name]:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        check_environment()
        code: int = args.run(args)
    except (UserError, BackendError) as error:
        print(f"kernelpose: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a folder closed to us, a full disk behind stdout
        where = "a file or a stream" if error.filename is None else error.filename
        print(f"kernelpose: {where} cannot be used: {error.strerror or error}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kernelpose: interrupted", file=sys.stderr)
        return 130
    return code
