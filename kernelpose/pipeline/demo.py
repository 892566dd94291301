"""`kernelpose demo`: one picture through a model, by our kernels and by eager PyTorch."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import kernelpose
from kernelpose.backend import choose
from kernelpose.codecs import decode_heatmap, encode_udp, heatmap_to_image
from kernelpose.data.boxes import box_to_center_scale, warp_matrix
from kernelpose.data.crop import crop_image, normalize
from kernelpose.data.figure import Figure, draw_figure
from kernelpose.data.files import make_directory
from kernelpose.data.images import read_image, write_png
from kernelpose.models import ViTPose
from kernelpose.nn import WindowAttention
from kernelpose.pipeline import outputs
from kernelpose.pipeline.chart import Comparison, draw_chart
from kernelpose.pipeline.command import add_model_argument, add_out_argument
from kernelpose.pipeline.model import check_options, family_of
from kernelpose.pipeline.overlay import Person, draw_poses
from kernelpose.pipeline.panels import Picture, draw_heatmaps, side_by_side, to_picture
from kernelpose.pipeline.predictor import Predictor
from kernelpose.pipeline.timing import interleaved, machine, wall_clock

TOLERANCE = 1e-4
"""How far our outputs may be from eager's, in parts of their spread (float32)."""

Way = Callable[[], AbstractContextManager[Any]]  # what surrounds a call that is timed

# ViTPose's form with the most attention to speed up: four times the tokens, in shifted windows.
_WINDOWED: dict[str, Any] = {"patch_stride": 8, "attention": "window+shift", "window": (8, 8)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument(
        "--image", metavar="FILE", type=Path, help="a photograph; else the package draws a figure"
    )
    add_model_argument(parser)
    add_out_argument(parser, "demo")


@torch.inference_mode()
def run(args: argparse.Namespace) -> int:
    """Compare outputs, measure, and leave a picture and a chart; 1 if the outputs differ."""
    figure = draw_figure() if args.image is None else None
    image = figure.image if figure is not None else read_image(args.image)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = _models(args.model, device)
    make_directory(args.out)
    size = next(iter(models.values())).image_size
    assert isinstance(size, tuple)
    height, width = image.shape[:2]
    box = torch.tensor([[0, 0, width, height]] if figure is None else [figure.box.tolist()])
    center, scale = box_to_center_scale(box, size)
    crop = crop_image(torch.tensor(image), warp_matrix(center, scale, size), size)
    inputs = normalize(crop).to(device)
    print(
        f"{args.model} on {args.image or 'a drawn figure'}, {size[0]}x{size[1]}, {machine(device)}"
    )

    comparisons = []
    equal = True
    for title, model in models.items():
        difference = _difference(model, inputs)
        equal &= difference <= TOLERANCE
        comparisons.append(_compare_models(title, model, inputs))
        print(f"{title}\n  largest difference from eager: {difference:.1e} of the outputs' spread "
              f"({'equal' if difference <= TOLERANCE else 'NOT EQUAL'} to {TOLERANCE:.0e})\n"
              f"  {_in_words(comparisons[-1])}")  # fmt: skip
    layer = _compare_layers(device)
    comparisons.append(layer)
    print(f"{layer.title}\n  {_in_words(layer)}")

    first = next(iter(models.values()))
    picture = (
        _drawn_panels(figure, crop[0], center, scale, first)
        if figure is not None
        else _photograph_panels(first, image)
    )
    pose, chart = args.out / "demo_pose.png", args.out / "demo_speed.png"
    write_png(pose, picture)
    draw_chart(chart, comparisons, f"medians of interleaved runs, one person, {machine(device)}")
    print(f"picture: {pose}\nchart:   {chart}")
    if not equal:
        print("the outputs of our kernels and of eager PyTorch differ: please report this")
    return 0 if equal else 1


def _models(name: str, device: torch.device) -> dict[str, Any]:
    """The model, and for ViTPose its windowed form, with random but repeatable weights."""
    check_options(name, family_of(name), {})
    forms: dict[str, dict[str, Any]] = {name: {}}
    if name.startswith("vitpose"):
        forms = {f"{name}: full attention, features at 1/16": {}}
        forms[f"{name}: shifted 8x8 windows, features at 1/8"] = _WINDOWED
    models = {}
    for title, options in forms.items():
        torch.manual_seed(0)
        models[title] = kernelpose.create_model(name, **options).to(device).eval()
    return models


def _difference(model: nn.Module, inputs: Tensor) -> float:
    ours = outputs.run(model, inputs)
    with kernelpose.backend("eager"):
        eager = outputs.run(model, inputs)
    return max(
        float((found - expected).abs().max() / (expected.max() - expected.min()))
        for found, expected in zip(ours, eager, strict=True)
    )


def _compare_models(title: str, model: nn.Module, inputs: Tensor) -> Comparison:
    if not isinstance(model, ViTPose):  # of several ops, each with its own choice
        ways: dict[str, Way] = {"eager PyTorch": _eager, "kernelpose": nullcontext}
        return _timed(title, ways, lambda: model(inputs))
    attention = next(m for m in model.modules() if isinstance(m, WindowAttention))
    rows, columns = model.backbone.grid  # type: ignore[misc]
    qkv = inputs.new_empty(1, rows, columns, attention.qkv.out_features)
    options = {"num_heads": attention.num_heads, "window": attention.window}
    return _compare(title, qkv, options, lambda: model(inputs))


def _compare_layers(device: torch.device) -> Comparison:
    options: dict[str, Any] = {"num_heads": 12, "window": (8, 8), "shift": (4, 4)}
    qkv = torch.randn(1, 32, 24, 3 * 768, device=device)
    return _compare(
        "attention of one ViTPose-B layer alone: shifted 8x8 windows on 32x24 tokens",
        qkv,
        options,
        lambda: kernelpose.ops.window_attention(qkv, **options),
    )


def _compare(
    title: str, qkv: Tensor, options: dict[str, Any], call: Callable[[], object]
) -> Comparison:
    """Time a call under eager, under SDPA where that is no mere part of ours, and as chosen."""
    chosen = choose("window_attention", None, qkv, **options)
    ways: dict[str, Way] = {"eager PyTorch": _eager}
    if (
        chosen != "torch"
        and kernelpose.why_not("window_attention", "torch", qkv, **options) is None
    ):
        ways["PyTorch with SDPA"] = _sdpa
    ways[f"kernelpose ({'chooses SDPA' if chosen == 'torch' else chosen})"] = nullcontext
    return _timed(title, ways, call)


def _eager() -> AbstractContextManager[None]:
    return kernelpose.backend("eager")


@contextmanager
def _sdpa() -> Iterator[None]:
    """Eager but for attention, which is one call of PyTorch's."""
    attention = partial(kernelpose.ops.window_attention, backend="torch")
    with _eager(), mock.patch.object(kernelpose.ops, "window_attention", attention):
        yield


def _timed(title: str, ways: Mapping[str, Way], call: Callable[[], object]) -> Comparison:
    def within(way: Way) -> Callable[[], object]:
        def run_it() -> object:
            with way():
                return call()

        return run_it

    samplers = {label: wall_clock(within(way)) for label, way in ways.items()}
    taken = interleaved(samplers, budget_s=25, min_rounds=3, max_rounds=15)
    return Comparison(title, {k: statistics.median(v) * 1e3 for k, v in taken.items()})


def _drawn_panels(
    figure: Figure, crop: Tensor, center: Tensor, scale: Tensor, model: Any
) -> Picture:
    """The figure's known joints as heatmaps and back: what a trained model would have to say."""
    truth = torch.tensor(figure.keypoints, dtype=torch.float64)
    size = model.image_size
    heatmap_size = (size[0] // 4, size[1] // 4)  # whatever the model gives
    matrix = warp_matrix(center, scale, size)[0]
    in_crop = (truth @ matrix[:, :2].T + matrix[:, 2])[None]
    heatmaps, _ = encode_udp(
        in_crop, torch.ones(1, len(truth)), input_size=size, heatmap_size=heatmap_size
    )
    points, scores = decode_heatmap(heatmaps)
    found = heatmap_to_image(points.double(), center, scale, heatmap_size, udp=True)[0]
    error = float((found - truth).norm(dim=-1).mean())
    person = Person(found.numpy().astype(np.float32), scores[0].numpy(), float(scores.mean()))
    return side_by_side(
        [
            ("a figure drawn by kernelpose", figure.image),
            (f"its true joints as {heatmap_size[0]}x{heatmap_size[1]} heatmaps",
             draw_heatmaps(to_picture(crop), heatmaps[0])),
            ("decoded from those heatmaps", draw_poses(figure.image, [person])),
        ],
        f"The model's weights are random, so the heatmaps are the encoded targets, not its output; "
        f"mean error of the way there and back: {error:.1g} pixel.",
    )  # fmt: skip


def _photograph_panels(model: nn.Module, image: Picture) -> Picture:
    poses = Predictor(model)(image)
    joints = poses.scores[0].cpu().numpy()
    person = Person(poses.keypoints[0].cpu().numpy(), joints, float(joints.mean()))
    return side_by_side(
        [("the picture", image), ("what the model makes of it", draw_poses(image, [person]))],
        "The model's weights are random: these joints mean nothing. "
        "With weights: kernelpose predict IMAGE --checkpoint FILE.",
    )


def _in_words(comparison: Comparison) -> str:
    times = comparison.milliseconds
    first = next(iter(times.values()))
    return ", ".join(
        f"{label} {value:.2f} ms" + (f" ({first / value:.2f}x)" if i else "")
        for i, (label, value) in enumerate(times.items())
    )
