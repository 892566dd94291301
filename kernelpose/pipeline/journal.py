"""What a run of `kernelpose predict` has done, so that one that was interrupted can go on."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from io import BufferedWriter
from pathlib import Path
from typing import Any

from kernelpose.data.files import replacing
from kernelpose.errors import UserError
from kernelpose.pipeline.sources import Source


@dataclass(frozen=True)
class Outcome:
    """What came of one source.

    Attributes:
        pictures: the persons of each picture, one of an image, one a frame of a video, as entries
            of a COCO result file whose ``image_id`` is still to be given.
        refused: a sentence for each thing in it that could not be done.
        whole: whether the boxes named none of it, so that whole pictures were taken.
    """

    pictures: list[list[dict[str, Any]]]
    refused: list[str] = field(default_factory=list)
    whole: bool = False


class Journal:
    """A file of JSON lines: the settings of the run, then an outcome each.

    A line cut short, where the machine stopped, does not count. A source counts while its file
    keeps its size and time of change and its overlay its name.

    Args:
        path: the file; it is made by `__enter__`.
        settings: what must be equal for a run to be continued, by the name of its argument.

    Raises:
        UserError: the file is there and was begun with other settings, or is no journal.
    """

    def __init__(self, path: Path, settings: Mapping[str, str]) -> None:
        self._path = path
        self._settings = dict(settings)
        self._outcomes: dict[str, Outcome] = {}
        self._end = 0  # of the last whole line
        self._file: BufferedWriter | None = None
        if path.exists():
            self._read()

    def __enter__(self) -> Journal:
        """Open the file for `add`, where it is not there with the settings in it."""
        if not self._end:
            with replacing(self._path) as partial:
                partial.write_bytes(_line(self._settings))
            self._end = len(_line(self._settings))
        try:
            os.truncate(self._path, self._end)
            self._file = self._path.open("ab")
        except OSError as error:
            raise self._unwritable(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        with suppress(OSError):  # of `add`, which has told of it
            self._file.close()

    def outcome(self, source: Source) -> Outcome | None:
        """What came of a source, if it has been done."""
        return self._outcomes.get(_key(source))

    def add(self, source: Source, outcome: Outcome) -> None:
        """Keep what came of a source, whose overlay is written."""
        assert self._file is not None
        try:
            self._file.write(_line({"source": _key(source), **asdict(outcome)}))
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        self._outcomes[_key(source)] = outcome

    def remove(self) -> None:
        """Take the file away: the results are written."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> None:
        try:
            whole, _, _ = self._path.read_bytes().rpartition(b"\n")
            settings, *lines = [json.loads(line) for line in whole.split(b"\n")]
            self._end = len(whole) + 1
            self._outcomes = {line.pop("source"): Outcome(**line) for line in lines}
            self._compare(settings.items())
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise UserError(
                f"{self._path} is not what an interrupted run leaves ({error}); expected another "
                "--out, or that file deleted."
            ) from error

    def _compare(self, begun: Any) -> None:
        before = dict(begun)
        for name in {**before, **self._settings}:
            old, new = (texts.get(name, "") for texts in (before, self._settings))
            if old != new:
                old, new = (textwrap.shorten(text, 60, placeholder=" ...") for text in (old, new))
                raise UserError(
                    f"{name} is {new or 'not given'}; expected {old or 'none'} to go on with what "
                    f"was interrupted, another --out, or {self._path} deleted."
                )

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self._path} cannot be written: {error.strerror or error}.")


def stamped(path: Path) -> str:
    """A path, and what changes when its file does."""
    try:
        status = path.stat()
    except OSError:
        return str(path.absolute())
    return f"{path.absolute()} ({status.st_size} bytes, changed at {status.st_mtime_ns} ns)"


def _key(source: Source) -> str:
    return f"{stamped(source.path)} {source.overlay}"


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False).encode() + b"\n"
