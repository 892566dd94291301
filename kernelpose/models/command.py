"""`kernelpose models [--json]`: the zoo, what its models cost, and what was published of them."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict

from kernelpose.models.table import ModelInfo
from kernelpose.models.zoo import list_models

NOTE = """\
Parameters and GMACs of one image, with the first decoder and 17 joints, in the convention `all`: a
multiply-accumulate counts 1, those of attention included. `layers` leaves those out; `hooked` does
too, and counts norms, biases and ReLUs (kernelpose.models.counting). Weights: none shipped."""

COLUMNS = ("model", "input", "parameters, M", "GMACs", "published accuracy", "standing")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    models = list_models()
    print(json.dumps([asdict(model) for model in models], indent=2) if args.json else _text(models))
    return 0


def model_table() -> str:
    """The README's table of models, in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    for model in list_models():
        name, *costs, accuracy = _cells(model)
        if model.source:
            accuracy += f" ({model.source})"
        cells = (f"`{name}`", *costs, accuracy, model.standing)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(model: ModelInfo) -> tuple[str, ...]:
    height, width = model.image_size
    return (
        model.name,
        f"{height}×{width}",
        f"{model.parameters / 1e6:.1f}",
        f"{model.gmacs:.1f}",
        _accuracy(model.accuracy),
    )


def _accuracy(accuracy: Mapping[str, float] | None) -> str:
    if accuracy is None:
        return "–"
    return ", ".join(f"{what} {figure:g}" for what, figure in accuracy.items())


def _text(models: list[ModelInfo]) -> str:
    rows = [COLUMNS[:-1], *map(_cells, models)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines, table = lines[:1], lines[1:]
    for line, model in zip(table, models, strict=True):
        source = f"; accuracy: {model.source}" if model.source else ""
        note = textwrap.wrap(model.standing + source, 96)
        lines += [line, *(f"    {words}" for words in note)]
    return "\n".join((*lines, "", NOTE))
