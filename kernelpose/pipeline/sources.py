"""What a command line of pictures, videos and folders asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernelpose.data.videos import VIDEO_SUFFIXES, opencv
from kernelpose.errors import UserError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Source:
    """A picture or a video, and the file name of the overlay that it gets."""

    path: Path
    overlay: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_sources(arguments: Sequence[Path]) -> list[Source]:
    """The files named, and those in the folders named, each once, with overlays of unlike names.

    Files of a folder come in the order of their names; those that are neither pictures nor videos
    by their ending, hidden ones and folders within are left out.

    Raises:
        UserError: an argument that is neither a file nor a folder with something to look at, or a
            video without OpenCV to read it.
    """
    paths: dict[Path, Path] = {}
    for argument in arguments:
        for path in _listed(argument) if argument.is_dir() else [argument]:
            if not path.is_file():
                raise UserError(f"{path} is no file; expected an image, a video or a folder.")
            paths.setdefault(path.absolute(), path)
    sources = []
    taken: set[str] = set()
    for path in paths.values():
        suffix = ".mp4" if path.suffix.lower() in VIDEO_SUFFIXES else ".png"
        overlay, number = f"{path.stem}_pose{suffix}", 2
        while overlay in taken:
            overlay = f"{path.stem}_pose_{number}{suffix}"
            number += 1
        taken.add(overlay)
        sources.append(Source(path, overlay))
    if any(source.is_video for source in sources):
        opencv()
    return sources


def _listed(folder: Path) -> list[Path]:
    wanted = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    try:
        found = sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in wanted and path.is_file() and not path.name.startswith(".")
        )
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}.") from error
    if not found:
        raise UserError(f"{folder} holds no image and no video; expected one such as a JPEG.")
    return found
