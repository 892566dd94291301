"""Reading and writing videos, through OpenCV."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernelpose.data.files import replacing
from kernelpose.errors import UserError

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
_USUAL_RATE = 25.0

Pixels = NDArray[np.uint8]


def opencv() -> Any:
    """OpenCV's module, or a UserError that says how to get it."""
    try:
        return importlib.import_module("cv2")
    except ImportError as error:
        raise UserError(
            f"OpenCV is missing ({error}); expected for videos: pip install kernelpose[predict]."
        ) from error


class Video:
    """A video file, opened: its frames, read once from the first to the last that can be read.

    Attributes:
        rate: frames a second.
        announced: how many frames its head says it has, which need not be true.
    """

    def __init__(self, path: Path) -> None:
        cv2 = opencv()
        self._path = path
        self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise UserError(
                f"{path} is no video that OpenCV can read; expected one such as an MP4."
            )
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate: float = rate if 0 < rate < 1000 else _USUAL_RATE
        self.announced = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[Pixels]:
        """Frames (H, W, 3) uint8 RGB.

        Raises:
            UserError: there is none.
        """
        cv2 = opencv()
        count = 0
        while True:
            found, pixels = self._capture.read()
            if not found:
                break
            count += 1
            yield cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
        self._capture.release()
        if count == 0:
            raise UserError(
                f"{self._path} has no frame that OpenCV can read; expected at least one."
            )


@contextmanager
def writing_video(path: str | os.PathLike[str], rate: float) -> Iterator[Callable[[Pixels], None]]:
    """Gives what takes the frames (H, W, 3) uint8 RGB of an MP4, which appears whole or not at all.

    The first frame says the size; of an odd one the last row or column is left out.

    Raises:
        UserError: the system or OpenCV does not let us write it.
    """
    cv2 = opencv()
    writer = cv2.VideoWriter()
    with replacing(path) as partial:

        def write(pixels: Pixels) -> None:
            if not writer.isOpened():
                height, width = pixels.shape[:2]
                codec = cv2.VideoWriter_fourcc(*"mp4v")
                if not writer.open(str(partial), cv2.CAP_FFMPEG, codec, rate, (width, height)):
                    raise UserError(
                        f"{path} cannot be written by OpenCV as an MP4 of {width}x{height}; "
                        "expected a place and a size that it can write."
                    )
            writer.write(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))

        try:
            yield write
        finally:
            writer.release()
