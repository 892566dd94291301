"""What a Predictor finds in one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kernelpose.data.coco import PERSON_CATEGORY, person_score


@dataclass(frozen=True)
class Poses:
    """The persons of one image, in its pixels; all tensors are float32 and on the CPU.

    keypoints: (N, K, 2) as x, y.
    scores: (N, K), the peak of each joint's heatmap.
    boxes: (N, 4) as x, y, width, height, those that were asked for.
    image: the path that the image was given by, or None.
    """

    keypoints: Tensor
    scores: Tensor
    boxes: Tensor
    image: Path | None = None

    def __len__(self) -> int:
        return len(self.keypoints)

    def person_scores(self, box_scores: Sequence[float] | None = None) -> list[float]:
        """COCO's usual score of each person: its box's (1 by default) times its joints' mean."""
        given = [1.0] * len(self) if box_scores is None else box_scores
        return [
            person_score(box, joints.tolist())
            for box, joints in zip(given, self.scores, strict=True)
        ]

    def to_coco(
        self, image_id: int | None = None, *, box_scores: Sequence[float] | None = None
    ) -> list[dict[str, Any]]:
        """Entries of a COCO keypoint result file, one a person.

        Args:
            image_id: by default the image's file name, where that is a number, as in COCO.
            box_scores: N scores of the detector; 1 by default.

        Raises:
            ValueError: no image_id, and none in the file name.
        """
        if image_id is None:
            stem = "" if self.image is None else self.image.stem
            if not stem.isdecimal():
                raise ValueError(
                    f"image_id is None; expected a number for an image named {str(self.image)!r}."
                )
            image_id = int(stem)
        file_name = {} if self.image is None else {"file_name": self.image.name}
        return [
            {
                "image_id": image_id,
                **file_name,
                "category_id": PERSON_CATEGORY,
                "keypoints": [
                    round(value, 3)
                    for point, joint_score in zip(points.tolist(), joints.tolist(), strict=True)
                    for value in (*point, joint_score)
                ],
                "score": round(score, 5),
            }
            for points, joints, score in zip(
                self.keypoints, self.scores, self.person_scores(box_scores), strict=True
            )
        ]
