"""What the joints of a data set are called, which mirror each other, and how limbs link them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Skeleton:
    """Joints of one annotation scheme.

    Attributes:
        names: one a joint; ``left_`` and ``right_`` mark the person's own sides.
        links: pairs of joint indices that a limb connects.
    """

    names: tuple[str, ...]
    links: tuple[tuple[int, int], ...]

    @property
    def num_keypoints(self) -> int:
        return len(self.names)

    @property
    def flip_pairs(self) -> tuple[tuple[int, int], ...]:
        """(left, right) indices of the joints that a mirror swaps."""
        index = {name: i for i, name in enumerate(self.names)}
        return tuple(
            (i, index["right_" + name.removeprefix("left_")])
            for i, name in enumerate(self.names)
            if name.startswith("left_")
        )

    def side(self, *joints: int) -> str:
        """``"left"`` or ``"right"`` where only that side occurs among joints, else ``"center"``."""
        sides = {self.names[joint].split("_")[0] for joint in joints} & {"left", "right"}
        return sides.pop() if len(sides) == 1 else "center"


COCO = Skeleton(
    names=(
        "nose",
        "left_eye",
        "right_eye",
        "left_ear",
        "right_ear",
        "left_shoulder",
        "right_shoulder",
        "left_elbow",
        "right_elbow",
        "left_wrist",
        "right_wrist",
        "left_hip",
        "right_hip",
        "left_knee",
        "right_knee",
        "left_ankle",
        "right_ankle",
    ),
    links=(
        (15, 13),
        (13, 11),
        (16, 14),
        (14, 12),
        (11, 12),
        (5, 11),
        (6, 12),
        (5, 6),
        (5, 7),
        (7, 9),
        (6, 8),
        (8, 10),
        (1, 2),
        (0, 1),
        (0, 2),
        (1, 3),
        (2, 4),
        (3, 5),
        (4, 6),
    ),
)

MPII = Skeleton(
    names=(
        "right_ankle",
        "right_knee",
        "right_hip",
        "left_hip",
        "left_knee",
        "left_ankle",
        "pelvis",
        "thorax",
        "upper_neck",
        "head_top",
        "right_wrist",
        "right_elbow",
        "right_shoulder",
        "left_shoulder",
        "left_elbow",
        "left_wrist",
    ),
    links=(
        (0, 1),
        (1, 2),
        (2, 6),
        (5, 4),
        (4, 3),
        (3, 6),
        (6, 7),
        (7, 8),
        (8, 9),
        (7, 12),
        (12, 11),
        (11, 10),
        (7, 13),
        (13, 14),
        (14, 15),
    ),
)

SKELETONS = {"coco": COCO, "mpii": MPII}
"""By the name of the data set."""


def skeleton_of(num_keypoints: object) -> Skeleton | None:
    """The skeleton of so many joints, which is all that most models tell of theirs."""
    return next((s for s in SKELETONS.values() if s.num_keypoints == num_keypoints), None)
