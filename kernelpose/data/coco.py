"""COCO's JSON files of detections and of keypoint results."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelpose.data.files import replacing
from kernelpose.errors import UserError

PERSON_CATEGORY = 1


@dataclass(frozen=True)
class Detection:
    """A detector's box (x, y, width, height) in image pixels, and which image it is of.

    ``frame`` counts the frames of a video from 0.
    """

    box: tuple[float, float, float, float]
    score: float
    image_id: int | str | None
    file_name: str | None
    frame: int | None = None


class DetectionIndex:
    """Detections by the image that they are of."""

    def __init__(self, detections: Iterable[Detection]) -> None:
        self._found: dict[int | str | tuple[str], list[Detection]] = {}
        for detection in detections:
            if detection.file_name is not None:
                key: int | str | tuple[str] = (Path(detection.file_name).name,)
            else:
                assert detection.image_id is not None
                key = detection.image_id
            self._found.setdefault(key, []).append(detection)

    def of(self, path: Path) -> list[Detection]:
        """Those of the image or video at path.

        By file name, or by an id that is the name without its ending, with it, or its number, as in
        COCO.
        """
        keys: list[int | str | tuple[str]] = [(path.name,), path.name]
        if path.stem != path.name:
            keys.append(path.stem)
        if path.stem.isdecimal():
            keys.append(int(path.stem))
        return [detection for key in keys for detection in self._found.get(key, [])]


def read_detections(path: str | os.PathLike[str]) -> list[Detection]:
    """The persons in a COCO detections file: a list of {image_id, category_id, bbox, score}.

    Each entry names its image by ``image_id`` or ``file_name``, and in a video a ``frame``.
    ``score`` is 1 and the category a person where they are absent; other categories are left out.

    Raises:
        UserError: no such file, no JSON, no list, or an entry that does not fit.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            entries = json.load(file)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; expected a file of boxes."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not JSON ({error}); expected a list of COCO detections."
        ) from error
    if not isinstance(entries, list):
        raise UserError(f"{path} is {_json_type(entries)}; expected a list of COCO detections.")
    detections = []
    for number, entry in enumerate(entries):
        where = f"entry {number} of {path}"
        if not isinstance(entry, dict):
            raise UserError(f"{where} is {_json_type(entry)}; expected an object.")
        if entry.get("category_id", PERSON_CATEGORY) == PERSON_CATEGORY:
            detections.append(_detection(entry, where))
    return detections


def person_score(box_score: float, joint_scores: Iterable[float]) -> float:
    """COCO's usual rescoring: the box's score times the mean of the joints' above 0.2."""
    seen = [float(score) for score in joint_scores if score > 0.2]
    return box_score * sum(seen) / len(seen) if seen else 0.0


def image_ids(paths: Sequence[Path]) -> list[int]:
    """A different id for each image: its numeric stem, as in COCO, else a free number from 1."""
    numbers = [int(path.stem) if path.stem.isdecimal() else None for path in paths]
    named = set(numbers)
    free = (number for number in itertools.count(1) if number not in named)
    used: set[int] = set()
    ids = []
    for number in numbers:
        image_id = next(free) if number is None or number in used else number
        used.add(image_id)
        ids.append(image_id)
    return ids


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, allow_nan=False)


def _detection(entry: dict[str, Any], where: str) -> Detection:
    box = entry.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        raise UserError(f"bbox of {where} is {box!r}; expected four finite numbers x, y, w, h.")
    if box[2] <= 0 or box[3] <= 0:
        raise UserError(f"bbox of {where} is {box!r}; expected a positive width and height.")
    score = entry.get("score", 1.0)
    if not _is_number(score):
        raise UserError(f"score of {where} is {score!r}; expected a finite number.")
    image_id, file_name = entry.get("image_id"), entry.get("file_name")
    if isinstance(image_id, bool) or not isinstance(image_id, int | str | None):
        raise UserError(f"image_id of {where} is {image_id!r}; expected an integer or a string.")
    if not isinstance(file_name, str | None):
        raise UserError(f"file_name of {where} is {file_name!r}; expected a string.")
    if image_id is None and file_name is None:
        raise UserError(f"{where} names no image; expected an image_id or a file_name.")
    frame = entry.get("frame")
    if isinstance(frame, bool) or not isinstance(frame, int | None) or (frame or 0) < 0:
        raise UserError(f"frame of {where} is {frame!r}; expected an integer from 0 on.")
    x, y, width, height = map(float, box)
    return Detection((x, y, width, height), float(score), image_id, file_name, frame)


def _is_number(value: object) -> bool:
    # Not math.isfinite, which fails on an integer beyond the floats.
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a number")
