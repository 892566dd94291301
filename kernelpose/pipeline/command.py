"""`kernelpose predict IMAGE...`: keypoints as COCO JSON, and an overlay of each image."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kernelpose
from kernelpose.codecs import DECODE_MODES
from kernelpose.data.boxes import box_to_center_scale, can_be_cropped
from kernelpose.data.coco import Detection, image_ids, read_detections, write_json
from kernelpose.data.files import make_directory
from kernelpose.data.images import read_image, read_size, write_png
from kernelpose.errors import UserError
from kernelpose.pipeline.model import DEFAULT_MODEL, MODEL_OPTIONS, load_model, model_options
from kernelpose.pipeline.overlay import Person, draw_poses
from kernelpose.pipeline.poses import Poses
from kernelpose.pipeline.predictor import Predictor

RESULTS = "keypoints.json"
# Detectors list dozens of boxes that are hardly anybody: COCO's evaluation wants them all in the
# results, a picture does not.
MIN_DRAWN_BOX_SCORE = 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path)
    parser.add_argument(
        "--boxes",
        metavar="FILE",
        type=Path,
        help="persons as COCO detections, [{image_id or file_name, bbox: [x, y, w, h], score}]; "
        "an image_id is matched to a numeric file name; the whole image where there is none",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"one of {', '.join(kernelpose.list_models())} (default: what the checkpoint holds, "
        f"{DEFAULT_MODEL} without one)",
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", type=Path, help="weights, in any layout; random without"
    )
    parser.add_argument(
        "--model-option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="what neither a name nor a checkpoint of another layout tells, such as "
        f"attention=window+shift or window=8,8; of {', '.join(MODEL_OPTIONS)}",
    )
    parser.add_argument(
        "--flip-test", action="store_true", help="average with the mirrored image: slower, better"
    )
    parser.add_argument(
        "--decode",
        choices=DECODE_MODES,
        default="mmpose1",
        help="how heatmaps become points (default: %(default)s)",
    )
    add_out_argument(parser, "predictions")


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """`--model` of a command that runs one with random weights."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        default=DEFAULT_MODEL,
        help=f"one of {', '.join(kernelpose.list_models())} (default: %(default)s)",
    )


def add_out_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """`--out`, the same in every command that writes pictures."""
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path(default),
        help="where results go (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Predict, write the results, and say where they are."""
    detections = None if args.boxes is None else read_detections(args.boxes)
    tasks = _tasks(args.images, detections)
    _refuse_to_overwrite(
        [path for path in (*args.images, args.boxes, args.checkpoint) if path is not None],
        [args.out / name for name in (RESULTS, *(task.overlay for task in tasks))],
    )
    model = load_model(args.model, args.checkpoint, model_options(args.model_option))
    predictor = Predictor(model, flip_test=args.flip_test, decode=args.decode)
    make_directory(args.out)
    results: list[dict[str, Any]] = []
    for task, poses in _with_progress(predictor, tasks):
        box_scores = [score for _, score in task.boxes]
        named = dataclasses.replace(poses, image=task.path)
        results += named.to_coco(task.image_id, box_scores=box_scores)
        drawn = [
            person
            for person, score in zip(_persons(poses, box_scores), box_scores, strict=True)
            if score >= MIN_DRAWN_BOX_SCORE
        ]
        write_png(args.out / task.overlay, draw_poses(read_image(task.path), drawn))
    write_json(args.out / RESULTS, results)
    without = sum(not task.detected for task in tasks) if detections is not None else 0
    if without:
        print(f"{args.boxes} has no box for {without} of the images: the whole image was taken")
    print(
        f"{_count(len(results), 'person')} in {_count(len(tasks), 'image')}: "
        f"{args.out / RESULTS} and {_count(len(tasks), 'overlay')}, {args.out / tasks[0].overlay}"
        + (" ..." if len(tasks) > 1 else "")
    )
    return 0


def _refuse_to_overwrite(inputs: Sequence[Path], outputs: Sequence[Path]) -> None:
    read = {path.resolve(): path for path in inputs}
    for output in outputs:
        if output.resolve() in read:
            raise UserError(
                f"--out is {output.parent}; expected a folder where {output.name} does not replace "
                f"the input {read[output.resolve()]}."
            )


@dataclass(frozen=True)
class _Task:
    path: Path
    image_id: int
    overlay: str
    boxes: list[tuple[tuple[float, float, float, float], float]]
    detected: bool


def _tasks(paths: Sequence[Path], detections: list[Detection] | None) -> list[_Task]:
    """What to do, with every input looked at before the first long computation."""
    tasks = []
    taken: set[str] = set()
    for path, image_id in zip(paths, image_ids(paths), strict=True):
        height, width = read_size(path)
        found = [found for found in detections or [] if found.is_of(path)]
        for detection in found:
            x, y, w, h = detection.box
            crop = box_to_center_scale(torch.tensor([detection.box], dtype=torch.float64), (1, 1))
            box = f"a box of {path} is {', '.join(f'{side:g}' for side in detection.box)}"
            if not can_be_cropped(*crop).all():
                raise UserError(f"{box}; expected one neither too small nor too large to crop.")
            if x >= width or y >= height or x + w <= 0 or y + h <= 0:
                raise UserError(f"{box}; expected one that meets the {width}x{height} picture.")
        boxes = [(detection.box, detection.score) for detection in found]
        whole = [((0.0, 0.0, float(width), float(height)), 1.0)]
        overlay = f"{path.stem}_pose.png"
        number = 2
        while overlay in taken:
            overlay = f"{path.stem}_pose_{number}.png"
            number += 1
        taken.add(overlay)
        tasks.append(_Task(path, image_id, overlay, boxes or whole, bool(boxes)))
    return tasks


def _with_progress(predictor: Predictor, tasks: list[_Task]) -> Iterator[tuple[_Task, Poses]]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise UserError(
            f"tqdm is missing ({error}); expected for the progress bar: "
            "pip install kernelpose[predict]."
        ) from error
    items = ((read_image(task.path), [box for box, _ in task.boxes]) for task in tasks)
    bar = tqdm(
        total=sum(len(task.boxes) for task in tasks), unit=" persons", file=sys.stderr, delay=0.5
    )
    with bar:
        for task, poses in zip(tasks, predictor.stream(items), strict=True):
            yield task, poses
            bar.update(len(task.boxes))


def _persons(poses: Poses, box_scores: Sequence[float]) -> list[Person]:
    scores = poses.person_scores(box_scores)
    return [
        Person(points.numpy(), joints.numpy(), score)
        for points, joints, score in zip(poses.keypoints, poses.scores, scores, strict=True)
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
