"""Images and boxes in, keypoints in image pixels out, on the model's device."""

from __future__ import annotations

import copy
import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kernelpose.codecs import DECODE_MODES
from kernelpose.data.boxes import box_to_center_scale, can_be_cropped
from kernelpose.data.images import read_image
from kernelpose.data.skeletons import COCO, Skeleton, skeleton_of
from kernelpose.ops import crop_normalize
from kernelpose.ops.crop_normalize import DTYPES
from kernelpose.pipeline.graph import Graphed
from kernelpose.pipeline.outputs import decode, merge, run, run_mirrored
from kernelpose.pipeline.poses import Poses


class Predictor:
    """A top-down pose model with its pre- and post-processing, all on the model's device.

    Crops are boxes grown by 1.25 and warped as in UDP; persons of several images share batches, and
    only keypoints and scores come back to the host. Batches and their order change nothing but
    rounding. On a GPU the next images are uploaded while a batch is computed.

    Args:
        model: (B, 3, h, w) images to (B, K, h', w') heatmaps, or to SimCC logits (B, K, bins of
            the width) and (B, K, bins of the height); put into evaluation mode.
        image_size: (height, width) of the model's input; by default ``model.image_size``.
        skeleton: what the K joints are, for the flip test; by default MPII's for a model whose
            ``num_keypoints`` is 16, else COCO's.
        flip_test: average the outputs with those of the mirrored crops, as published figures do;
            see `kernelpose.pipeline.outputs.run_mirrored`.
        decode: one of `kernelpose.codecs.DECODE_MODES`, for heatmaps.
        batch_size: most persons in one pass.
        device, dtype: where and in what the model computes; a copy of it is made where it has
            another device or dtype.
        compile: run the model through ``torch.compile``.
        cuda_graph: on a GPU, replay each batch from a CUDA graph, one for each size of batch that
            comes; "auto" does so for single persons, whose time is that of the launches.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: tuple[int, int] | None = None,
        skeleton: Skeleton | None = None,
        flip_test: bool = True,
        decode: str = "mmpose1",
        batch_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        cuda_graph: bool | Literal["auto"] = "auto",
    ) -> None:
        size = image_size or getattr(model, "image_size", None)
        if size is None:
            raise ValueError(
                "image_size is None; expected (height, width) for a model without that attribute."
            )
        if decode not in DECODE_MODES:
            raise ValueError(f"decode is {decode!r}; expected one of {', '.join(DECODE_MODES)}.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
        model, self._device, self._dtype = _placed(model, device, dtype)
        self.model = model.eval()
        if cuda_graph is True and self._device.type != "cuda":
            raise ValueError(
                f"cuda_graph is True; expected 'auto' or False for a model on {self._device}."
            )
        self.image_size: tuple[int, int] = (int(size[0]), int(size[1]))
        joints = getattr(model, "num_keypoints", None)
        self.skeleton = skeleton or skeleton_of(joints) or COCO
        self.flip_test = flip_test
        self.decode = decode
        self.batch_size = batch_size
        self._forward = torch.compile(self.model) if compile else self.model
        self._graphed = Graphed(self._keypoints)
        self._graphs_wanted = cuda_graph is True
        # The largest batch that is replayed from a graph.
        largest = {True: batch_size, "auto": 1, False: 0}[cuda_graph]
        self._graph_size = largest if self._device.type == "cuda" else 0
        self._uploads = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def __call__(self, image: Any, boxes: Any = None) -> Poses:
        """Poses of the persons in one image.

        Args:
            image: (H, W, 3) uint8 RGB, a tensor, an array or a Pillow image; or the path of one.
            boxes: (N, 4) as x, y, width, height in pixels, or [] for nobody; the whole image by
                default.

        Raises:
            ValueError: an image or a box that cannot be cropped. UserError: a file that is no
                picture.
        """
        return next(self.stream([(image, boxes)]))

    def stream(self, items: Iterable[tuple[Any, Any]]) -> Iterator[Poses]:
        """Poses for each (image, boxes), in order; as `__call__`, but batches span images.

        Up to a batch of persons is taken from ``items`` ahead of the poses that are given: a tensor
        must keep its pixels until its own poses have come.
        """
        requests: deque[_Request] = deque()
        waiting: deque[tuple[Tensor, Tensor]] = deque()  # (image, box) of persons
        running: deque[_Running] = deque()
        done: deque[tuple[Tensor, Tensor]] = deque()  # (keypoints, scores) of persons

        def launch() -> None:
            count = min(self.batch_size, len(waiting))
            running.append(self._launch([waiting.popleft() for _ in range(count)]))

        def collect(left: int) -> None:
            while len(running) > left:
                done.extend(running.popleft().persons())

        def answers() -> Iterator[Poses]:
            while requests and len(done) >= len(requests[0].boxes):
                request = requests.popleft()
                persons = [done.popleft() for _ in request.boxes]
                yield self._poses(request, persons)

        # One batch stays behind on a GPU, so that reading its results waits for nothing.
        behind = 0 if self._uploads is None else 1
        for image, boxes in items:
            request, pixels = self._request(image, boxes)
            requests.append(request)
            waiting.extend((pixels, box) for box in request.boxes)
            while len(waiting) >= self.batch_size:
                launch()
                collect(behind)
            if len(requests) > 2 * self.batch_size:  # many without anybody, who fill no batch
                if waiting:
                    launch()
                collect(0)
            yield from answers()
        if waiting:
            launch()
        collect(0)
        yield from answers()

    def _request(self, image: Any, boxes: Any) -> tuple[_Request, Tensor]:
        """What is asked, and the pixels, on the model's device or on their way there."""
        path = Path(image) if isinstance(image, str | os.PathLike) else None
        pixels = _tensor("image", image if path is None else read_image(path))
        shape = tuple(pixels.shape)
        if pixels.dtype != torch.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise ValueError(
                f"image is {pixels.dtype} of shape {shape}; expected uint8 RGB (H, W, 3), H and "
                "W >= 1."
            )
        if boxes is None:
            boxes = [[0, 0, pixels.shape[1], pixels.shape[0]]]
        boxes = _tensor("boxes", boxes).to("cpu", torch.float64)
        if boxes.shape == (0,):
            boxes = boxes.view(0, 4)
        self._check_boxes(boxes)
        return _Request(path, boxes), self._uploaded(pixels) if len(boxes) else pixels

    def _check_boxes(self, boxes: Tensor) -> None:
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(
                f"boxes has shape {tuple(boxes.shape)}; expected (N, 4): x, y, width, height."
            )
        cropped = can_be_cropped(*box_to_center_scale(boxes, self.image_size))
        good = cropped & (boxes[:, 2:] > 0).all(-1)
        if not bool(good.all()):
            raise ValueError(
                f"boxes are {boxes[~good].tolist()}; expected finite numbers with a positive width "
                "and height, neither too small nor too large to be cropped."
            )

    def _uploaded(self, pixels: Tensor) -> Tensor:
        if self._uploads is None or pixels.is_cuda:
            return pixels.to(self._device)
        with torch.cuda.stream(self._uploads):
            return pixels.pin_memory().to(self._device, non_blocking=True)

    @torch.inference_mode()
    def _launch(self, persons: Sequence[tuple[Tensor, Tensor]]) -> _Running:
        images: list[Tensor] = []
        index = []
        for pixels, _ in persons:
            if not images or images[-1] is not pixels:
                images.append(pixels)
            index.append(len(images) - 1)
        on_device = nullcontext() if self._uploads is None else torch.cuda.device(self._device)
        with on_device:
            if self._uploads is not None:
                stream = torch.cuda.current_stream()
                stream.wait_stream(self._uploads)
                for pixels in images:
                    pixels.record_stream(stream)
            crops, centers, scales = crop_normalize(
                images,
                self._to_device(torch.stack([box for _, box in persons])),
                self._to_device(torch.tensor(index)),
                size=self.image_size,
                dtype=self._dtype,
            )
            return _Running(*self._infer(crops, centers, scales))

    def _infer(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if len(inputs[0]) <= self._graph_size:
            try:
                return self._graphed(*inputs)
            except RuntimeError as error:
                if self._graphs_wanted:
                    raise
                warnings.warn(f"the model runs without a CUDA graph: {error}", stacklevel=4)
                self._graph_size = 0
        return self._keypoints(*inputs)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._uploads is not None:
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _keypoints(self, crops: Tensor, centers: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        if self.flip_test:
            found = merge(*run_mirrored(self._forward, crops), self.skeleton.flip_pairs)
        else:
            found = run(self._forward, crops)
        joints = self.skeleton.num_keypoints
        if found[0].shape[1] != joints:
            raise ValueError(
                f"skeleton has {joints} keypoints; expected {found[0].shape[1]}, as the model."
            )
        return decode(found, centers, scales, image_size=self.image_size, mode=self.decode)

    def _poses(self, request: _Request, persons: Sequence[tuple[Tensor, Tensor]]) -> Poses:
        boxes = request.boxes.float()
        if not persons:
            joints = self.skeleton.num_keypoints
            return Poses(torch.zeros(0, joints, 2), torch.zeros(0, joints), boxes, request.path)
        keypoints, scores = (torch.stack(tensors) for tensors in zip(*persons, strict=True))
        return Poses(keypoints, scores, boxes, request.path)


class _Request(NamedTuple):
    path: Path | None
    boxes: Tensor  # (N, 4) float64, on the CPU


class _Running:
    """A batch whose results are on their way to the host."""

    def __init__(self, keypoints: Tensor, scores: Tensor) -> None:
        self._keypoints = keypoints.to("cpu", non_blocking=True)
        self._scores = scores.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if keypoints.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def persons(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(keypoints (K, 2), scores (K,)) of each person, once they have arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return zip(self._keypoints, self._scores, strict=True)


def _placed(
    model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[nn.Module, torch.device, torch.dtype]:
    """The model or a copy, and where and in what it computes."""
    weight = next(model.parameters(), torch.empty(0))
    dtype = dtype or weight.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; expected torch.float32, torch.float16 or .bfloat16.")
    try:
        moved = torch.empty(0, device=device or weight.device, dtype=dtype)
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device is {device}; expected one that is here ({reason}).") from error
    if (moved.device, moved.dtype) != (weight.device, weight.dtype):
        model = copy.deepcopy(model).to(moved.device, moved.dtype)
    return model, moved.device, moved.dtype


def _tensor(name: str, values: Any) -> Tensor:
    """A tensor as it is; of anything else a copy, as PyTorch takes no negative strides."""
    if isinstance(values, Tensor):
        return values
    try:
        return torch.from_numpy(np.array(values, order="C"))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} is {type(values).__name__}; expected a tensor or an array of numbers."
        ) from error
