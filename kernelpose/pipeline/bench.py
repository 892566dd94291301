"""`kernelpose bench pipeline`: where the time goes from an image file to keypoints.

Our path and the plain one (OpenCV and numpy around the same model, `kernelpose.pipeline.plain`) do
the same work in the same stages and batches; each stage ends when the device is done.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kernelpose.data.boxes import box_to_center_scale, warp_matrix
from kernelpose.data.coco import write_json
from kernelpose.data.crop import IMAGENET_MEAN, IMAGENET_STD
from kernelpose.data.figure import draw_figure
from kernelpose.data.files import make_directory
from kernelpose.data.images import pillow, read_image
from kernelpose.data.skeletons import COCO
from kernelpose.ops import crop_normalize
from kernelpose.pipeline import outputs, plain
from kernelpose.pipeline.chart import draw_stacks
from kernelpose.pipeline.command import add_model_argument, add_out_argument
from kernelpose.pipeline.model import load_model, persons_a_pass
from kernelpose.pipeline.timing import interleaved, machine

STAGES = ("decode image", "crop", "forward", "flip", "decode")

Times = dict[str, float]  # stage -> seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument("target", choices=["pipeline"], help="what to measure")
    add_model_argument(parser)
    parser.add_argument(
        "--persons", metavar="N", nargs="+", type=_positive, default=[1, 8, 64],
        help="persons in the image, one measurement each (default: 1 8 64)",
    )  # fmt: skip
    parser.add_argument(
        "--image", metavar="FILE", type=Path, help="a photograph; else a figure that is drawn"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default=None,
        help="of the model and its crops, in both paths (default: bfloat16 on a GPU, else float32)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", metavar="SECONDS", type=float, default=30.0,
        help="when no new round starts for a number of persons (default: %(default)g)",
    )  # fmt: skip
    add_out_argument(parser, "bench")


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number of persons")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Measure both paths, print a table, and leave a chart and the figures."""
    table: dict[int, dict[str, Times]] = {}
    with _image_file(args.image) as path:
        boxes = {count: _boxes(path, count) for count in args.persons}
        make_directory(args.out)
        model = load_model(args.model, None)
        usual = torch.bfloat16 if next(model.parameters()).is_cuda else torch.float32
        dtype = usual if args.dtype is None else getattr(torch, args.dtype)
        model = model.to(dtype)
        for count in boxes:
            table[count] = _measure(model, path, boxes[count], args.budget)
            print(_lines(count, table[count]), flush=True)
    where = machine(next(model.parameters()).device)
    caption = f"{args.model}, {str(dtype)[6:]}, flip test, medians of interleaved runs; {where}"
    print(caption)
    chart, figures = args.out / "pipeline.png", args.out / "pipeline.json"
    draw_stacks(
        chart,
        "From an image file to keypoints",
        {_people(count): paths for count, paths in table.items()},
        caption,
        without="forward",
    )
    write_json(
        figures,
        {"machine": where, "model": args.model, "dtype": str(dtype)[6:], "seconds": table},
    )
    print(f"chart:   {chart}\nfigures: {figures}")
    return 0


@contextlib.contextmanager
def _image_file(path: Path | None) -> Iterator[Path]:
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder, "figure.jpg")
        pillow("Image").fromarray(draw_figure().image).save(drawn, quality=92)
        yield drawn


def _boxes(path: Path, count: int) -> Tensor:
    """Boxes of persons all over the image, the same on every call."""
    height, width = read_image(path).shape[:2]
    random = np.random.default_rng(0)
    size = np.array([width, height]) * random.uniform(0.2, 0.6, (count, 1)) * [[0.5, 1.0]]
    corner = random.uniform(0, 1, (count, 2)) * (np.array([width, height]) - size)
    return torch.from_numpy(np.concatenate((corner, size), 1))


class _Clock:
    """Adds the time since the last call to a stage."""

    def __init__(self) -> None:
        self.times: Times = dict.fromkeys(STAGES, 0.0)
        self._last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times[stage] += now - self._last
        self._last = now


def _ours(model: nn.Module, path: Path, boxes: Tensor) -> Times:
    weight, size = next(model.parameters()), _input_size(model)
    device, dtype = weight.device, weight.dtype
    clock = _Clock()
    image = torch.from_numpy(read_image(path))
    clock("decode image")
    image = image.to(device)
    for part in boxes.split(persons_a_pass(model)):
        index = torch.zeros(len(part), dtype=torch.int64, device=device)
        crops, centers, scales = crop_normalize(
            [image], part.to(device), index, size=size, dtype=dtype
        )
        clock("crop")
        found, flipped = outputs.run_mirrored(model, crops)
        clock("forward")
        found = outputs.merge(found, flipped, COCO.flip_pairs)
        clock("flip")
        keypoints, scores = outputs.decode(found, centers, scales, image_size=size)
        keypoints.cpu(), scores.cpu()
        clock("decode")
    return clock.times


def _plainly(model: nn.Module, path: Path, boxes: Tensor) -> Times:
    weight, size = next(model.parameters()), _input_size(model)
    clock = _Clock()
    image = plain.read_image(path)
    clock("decode image")
    for part in boxes.split(persons_a_pass(model)):
        center, scale = box_to_center_scale(part, size)
        matrices = warp_matrix(center, scale, size).numpy()
        pixels = plain.crop_and_normalize(image, matrices, size, IMAGENET_MEAN, IMAGENET_STD)
        crops = torch.from_numpy(pixels).to(weight.device, weight.dtype)
        clock("crop")
        found = outputs.run(model, crops)
        flipped = outputs.run(model, crops.flip(-1))
        clock("forward")
        merged = [
            plain.flip_merge(first, second, COCO.flip_pairs)
            for first, second in zip(_maps(found), _maps(flipped), strict=True)
        ]
        clock("flip")
        if len(merged) == 1:
            locations, _ = plain.decode_mmpose1(merged[0])
            grid = (merged[0].shape[2], merged[0].shape[3])
        else:
            x, y = merged[0], merged[1][..., 0]
            locations, _ = plain.decode_simcc(x, y, split_ratio=x.shape[2] / size[1])
            grid = size
        plain.to_image(locations, center.numpy(), scale.numpy(), grid)
        clock("decode")
    return clock.times


def _maps(found: outputs.Outputs) -> list[NDArray[Any]]:
    """As numpy has them; logits over rows are maps of one column, which a mirror leaves alone."""
    maps = [output.cpu().float().numpy() for output in found]
    return maps[:1] + [rows[..., None] for rows in maps[1:]]


def _input_size(model: nn.Module) -> tuple[int, int]:
    height, width = model.image_size  # type: ignore[misc]
    return int(height), int(width)


@torch.inference_mode()
def _measure(model: nn.Module, path: Path, boxes: Tensor, budget_s: float) -> dict[str, Times]:
    """Medians of each stage, the paths in turns; what a first call costs is left out."""
    paths = {"plain": _plainly, "kernelpose": _ours}
    for run_path in paths.values():
        run_path(model, path, boxes[:2])
    taken: dict[str, list[Times]] = {name: [] for name in paths}

    def sampler(name: str) -> Callable[[], float]:
        def sample() -> float:
            taken[name].append(paths[name](model, path, boxes))
            return sum(taken[name][-1].values())

        return sample

    interleaved({name: sampler(name) for name in paths},
                budget_s=budget_s, min_rounds=1, max_rounds=20)  # fmt: skip
    return {
        name: {stage: statistics.median(times[stage] for times in rounds) for stage in STAGES}
        for name, rounds in taken.items()
    }


def _lines(count: int, paths: dict[str, Times]) -> str:
    """The table of one number of persons, in milliseconds."""
    rows: list[tuple[Any, ...]] = [(f"{_people(count)}, ms", *paths, "ratio")]
    for stage in (*STAGES, "all", "all but forward"):
        left_out = {"all": (), "all but forward": ("forward",)}.get(stage)
        values = [
            1e3 * (times[stage] if left_out is None
                   else sum(v for k, v in times.items() if k not in left_out))
            for times in paths.values()
        ]  # fmt: skip
        ratio = f"{values[0] / values[1]:.2f}x" if values[1] else ""
        rows.append((stage, *(f"{value:.2f}" for value in values), ratio))
    return "\n".join(f"{row[0]:<18}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows)


def _people(count: int) -> str:
    return f"{count} person{'s' if count > 1 else ''}"
