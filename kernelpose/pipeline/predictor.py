"""Images and boxes in, keypoints in image pixels out, on the model's device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kernelpose.codecs import DECODE_MODES, decode_heatmap, flip_merge
from kernelpose.data.boxes import box_to_center_scale, can_be_cropped, warp_matrix
from kernelpose.data.crop import crop_image, normalize
from kernelpose.data.skeletons import COCO, Skeleton


@dataclass(frozen=True)
class Poses:
    """The persons of one image: keypoints (N, K, 2) as x, y in its pixels, scores (N, K)."""

    keypoints: Tensor
    scores: Tensor


class Predictor:
    """A top-down heatmap model with its pre- and post-processing.

    Crops are boxes grown by 1.25 and warped as in UDP; persons of several images share batches.

    Args:
        model: (B, 3, h, w) images to (B, K, h', w') heatmaps; put into evaluation mode.
        image_size: (height, width) of the model's input; by default ``model.image_size``.
        skeleton: what the K joints are, for the flip test.
        decode: one of `kernelpose.codecs.DECODE_MODES`.
        flip_test: average the heatmaps with those of the mirrored crops.
        batch_size: most persons in one forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: tuple[int, int] | None = None,
        skeleton: Skeleton = COCO,
        decode: str = "mmpose1",
        flip_test: bool = False,
        batch_size: int = 32,
    ) -> None:
        size = image_size or getattr(model, "image_size", None)
        if size is None:
            raise ValueError(
                "image_size is None; expected (height, width) for a model that does not name it."
            )
        if decode not in DECODE_MODES:
            raise ValueError(f"decode is {decode!r}; expected one of {', '.join(DECODE_MODES)}.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
        self.model = model.eval()
        self.image_size: tuple[int, int] = (int(size[0]), int(size[1]))
        self.skeleton = skeleton
        self.decode = decode
        self.flip_test = flip_test
        self.batch_size = batch_size

    def __call__(self, image: Any, boxes: Any = None) -> Poses:
        """Poses of the persons in one image.

        Args:
            image: (H, W, 3) uint8 RGB, a tensor, an array or a Pillow image.
            boxes: (N, 4) as x, y, width, height in pixels, or [] for nobody; the whole image by
                default.
        """
        return next(self.stream([(image, boxes)]))

    def stream(self, items: Iterable[tuple[Any, Any]]) -> Iterator[Poses]:
        """Poses for each (image, boxes), in order; as `__call__`, but batches span images."""
        counts: deque[int] = deque()
        waiting = self._persons(torch.zeros(1, 1, 3, dtype=torch.uint8), torch.zeros(0, 4))
        done = self._infer(waiting)
        for image, boxes in items:
            persons = self._persons(image, boxes)
            counts.append(len(persons[0]))
            waiting = _joined(waiting, persons)
            while len(waiting[0]) >= self.batch_size:
                done = _joined(done, self._infer(_part(waiting, slice(self.batch_size))))
                waiting = _part(waiting, slice(self.batch_size, None))
            while counts and len(done[0]) >= counts[0]:
                count = counts.popleft()
                yield Poses(*_part(done, slice(count)))
                done = _part(done, slice(count, None))
        done = _joined(done, self._infer(waiting))
        for count in counts:
            yield Poses(*_part(done, slice(count)))
            done = _part(done, slice(count, None))

    def _persons(self, image: Any, boxes: Any) -> tuple[Tensor, ...]:
        """uint8 crops (N, 3, h, w), centers (N, 2) and scales (N, 2) of one image's boxes."""
        device = next(self.model.parameters()).device
        pixels = _tensor(image).to(device)
        if pixels.dim() != 3 or pixels.shape[2] != 3:
            raise ValueError(f"image has shape {tuple(pixels.shape)}; expected (H, W, 3), RGB.")
        if boxes is None:
            boxes = [[0, 0, pixels.shape[1], pixels.shape[0]]]
        boxes = _tensor(boxes).double()
        if boxes.shape == (0,):
            boxes = boxes.view(0, 4)
        center, scale = box_to_center_scale(boxes, self.image_size)
        if not (bool((boxes[:, 2:] > 0).all()) and bool(can_be_cropped(center, scale).all())):
            raise ValueError(
                f"boxes are {boxes.tolist()}; expected finite ones with a positive width and "
                "height, neither too small nor too large to be cropped."
            )
        matrices = warp_matrix(center, scale, self.image_size)
        crops = crop_image(pixels, matrices, self.image_size)
        return crops, center.to(device), scale.to(device)

    @torch.inference_mode()
    def _infer(self, persons: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        crops, center, scale = persons
        joints = self.skeleton.num_keypoints
        if len(crops) == 0:
            return center.new_zeros(0, joints, 2), center.new_zeros(0, joints)
        images = normalize(crops).to(next(self.model.parameters()).dtype)
        heatmaps = self.model(images)
        if heatmaps.shape[1] != joints:
            raise ValueError(
                f"skeleton has {joints} keypoints; expected {heatmaps.shape[1]}, as the model."
            )
        if self.flip_test:
            flipped = self.model(images.flip(-1))
            heatmaps = flip_merge(heatmaps, flipped, self.skeleton.flip_pairs)
        return decode_heatmap(heatmaps, center, scale, mode=self.decode)


def _tensor(values: Any) -> Tensor:
    """A tensor as it is; of anything else a copy, as PyTorch takes no negative strides."""
    if isinstance(values, Tensor):
        return values
    return torch.from_numpy(np.array(values, order="C"))


def _joined(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(pair) for pair in zip(first, second, strict=True))


def _part(tensors: tuple[Tensor, ...], part: slice) -> tuple[Tensor, ...]:
    return tuple(tensor[part] for tensor in tensors)
