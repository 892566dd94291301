"""Poses of pictures and videos, as entries of a result file and drawn over them."""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kernelpose.data.boxes import box_to_center_scale, can_be_cropped
from kernelpose.data.coco import Detection, DetectionIndex
from kernelpose.data.images import read_image, write_png
from kernelpose.data.videos import Pixels, Video, writing_video
from kernelpose.errors import UserError
from kernelpose.pipeline.journal import Outcome
from kernelpose.pipeline.overlay import Person, draw_poses
from kernelpose.pipeline.poses import Poses
from kernelpose.pipeline.predictor import Predictor
from kernelpose.pipeline.sources import Source

# Detectors list dozens of boxes that are hardly anybody: COCO's evaluation wants them all in the
# results, a picture does not.
MIN_DRAWN_BOX_SCORE = 0.3

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class _Picture:
    """An image or a frame, and whom to look for."""

    source: Source
    pixels: Pixels
    boxes: list[Box]
    box_scores: list[float]
    refused: list[str]


class Annotator:
    """Finds the persons of sources, and leaves an overlay of each in a folder.

    Args:
        detections: whom to look for; whole pictures where it names nobody of a source.
        out: the folder, which exists.

    Attributes:
        failures: a sentence for each source that could not be done.
    """

    def __init__(self, predictor: Predictor, detections: DetectionIndex, out: Path) -> None:
        self._predictor = predictor
        self._detections = detections
        self._out = out
        self.failures: list[str] = []

    def outcomes(self, sources: Sequence[Source]) -> Iterator[tuple[Source, Outcome]]:
        """What came of each source that could be done, its overlay written: first the images.

        Raises:
            UserError: an image's overlay cannot be written.
        """
        images = [source for source in sources if not source.is_video]
        with _progress(len(images), "images") as bar:
            for picture, poses in self._stream(self._images(images, bar)):
                write_png(self._out / picture.source.overlay, self._drawn(picture, poses))
                yield (
                    picture.source,
                    Outcome(
                        [_entries(picture, poses)],
                        picture.refused,
                        not self._detections.of(picture.source.path),
                    ),
                )
                bar.update()
        for source in sources:
            if source.is_video:
                try:
                    outcome = self._video(source)
                except UserError as error:
                    self.failures.append(str(error))
                else:
                    yield source, outcome

    def _images(self, sources: Iterable[Source], bar: Any) -> Iterator[_Picture]:
        for source in sources:
            try:
                pixels = read_image(source.path)
            except UserError as error:
                self.failures.append(str(error))
                bar.update()
                continue
            found = self._detections.of(source.path)
            yield _picture(source, pixels, found or None, str(source.path))

    def _video(self, source: Source) -> Outcome:
        video = Video(source.path)
        of_frame: dict[int, list[Detection]] = {}
        for detection in self._detections.of(source.path):
            if detection.frame is None:
                raise UserError(
                    f"a box of {source.path} has no frame; expected the number of one, from 0 on."
                )
            of_frame.setdefault(detection.frame, []).append(detection)

        def frames() -> Iterator[_Picture]:
            for number, pixels in enumerate(video):
                found = of_frame.get(number, []) if of_frame else None
                yield _picture(source, pixels, found, f"frame {number} of {source.path}")

        outcome = Outcome([], whole=not of_frame)
        with (
            _progress(video.announced, source.path.name) as bar,
            writing_video(self._out / source.overlay, video.rate) as write,
        ):
            for number, (picture, poses) in enumerate(self._stream(frames())):
                write(self._drawn(picture, poses))
                entries = [{**entry, "frame": number} for entry in _entries(picture, poses)]
                outcome.pictures.append(entries)
                outcome.refused.extend(picture.refused)
                bar.update()
        count = len(outcome.pictures)
        beyond = [frame for frame in of_frame if frame >= count]
        if beyond:
            outcome.refused.append(
                f"boxes of {source.path} name frame {max(beyond)}; expected 0 to {count - 1}."
            )
        if count < 0.9 * video.announced:
            outcome.refused.append(
                f"{source.path} ends after {count} frames; expected {video.announced}, as its head "
                "announces."
            )
        return outcome

    def _stream(self, pictures: Iterable[_Picture]) -> Iterator[tuple[_Picture, Poses]]:
        pending: deque[_Picture] = deque()

        def items() -> Iterator[tuple[torch.Tensor, list[Box]]]:
            for picture in pictures:
                pending.append(picture)
                yield torch.from_numpy(picture.pixels), picture.boxes

        for poses in self._predictor.stream(items()):
            yield pending.popleft(), poses

    def _drawn(self, picture: _Picture, poses: Poses) -> Pixels:
        persons = zip(
            poses.keypoints,
            poses.scores,
            poses.person_scores(picture.box_scores),
            picture.box_scores,
            strict=True,
        )
        return draw_poses(
            picture.pixels,
            [
                Person(points.numpy(), joints.numpy(), score)
                for points, joints, score, box_score in persons
                if box_score >= MIN_DRAWN_BOX_SCORE
            ],
            skeleton=self._predictor.skeleton,
        )


def _picture(
    source: Source, pixels: Pixels, found: Sequence[Detection] | None, name: str
) -> _Picture:
    """With the boxes that can be cropped and meet the picture; without any, all of it."""
    height, width = pixels.shape[:2]
    if found is None:
        return _Picture(source, pixels, [(0.0, 0.0, float(width), float(height))], [1.0], [])
    picture = _Picture(source, pixels, [], [], [])
    for detection in found:
        x, y, w, h = detection.box
        crop = box_to_center_scale(torch.tensor([detection.box], dtype=torch.float64), (1, 1))
        text = f"a box of {name} is {', '.join(f'{side:g}' for side in detection.box)}"
        if not can_be_cropped(*crop).all():
            picture.refused.append(f"{text}; expected one neither too small nor too large to crop.")
        elif x >= width or y >= height or x + w <= 0 or y + h <= 0:
            picture.refused.append(f"{text}; expected one that meets the {width}x{height} picture.")
        else:
            picture.boxes.append(detection.box)
            picture.box_scores.append(detection.score)
    return picture


def _entries(picture: _Picture, poses: Poses) -> list[dict[str, Any]]:
    named = dataclasses.replace(poses, image=picture.source.path)
    return named.to_coco(0, box_scores=picture.box_scores)


def _progress(total: int, name: str) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise UserError(
            f"tqdm is missing ({error}); expected for the progress bar: "
            "pip install kernelpose[predict]."
        ) from error
    return tqdm(
        total=total or None, desc=name, unit=" images", file=sys.stderr, delay=0.5, leave=False
    )
