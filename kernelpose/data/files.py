"""Writing files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kernelpose.errors import UserError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path beside ``path`` to write to, which takes its place if the block succeeds.

    It ends as ``path`` does, by which some writers choose the format.

    Raises:
        UserError: the system does not let us write there.
    """
    path = Path(path)
    if not path.name:
        raise UserError(f"{path} is a directory; expected a file to write.")
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written; expected {path.parent} to be a directory.")
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):  # nothing there, or no place where anything can be
            partial.unlink()


def make_directory(path: str | os.PathLike[str]) -> None:
    """Make sure that a directory is there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made a directory: {error.strerror}.") from error
