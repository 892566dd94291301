"""`kernelpose predict INPUT...`: keypoints as COCO JSON, and an overlay of each image or video."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import kernelpose
from kernelpose.codecs import DECODE_MODES
from kernelpose.data.coco import DetectionIndex, image_ids, read_detections, write_json
from kernelpose.data.files import make_directory
from kernelpose.errors import UserError
from kernelpose.pipeline.annotate import Annotator
from kernelpose.pipeline.journal import Journal, Outcome, stamped
from kernelpose.pipeline.model import (
    DEFAULT_MODEL,
    MODEL_OPTIONS,
    load_model,
    model_options,
    persons_a_pass,
    pose_models,
)
from kernelpose.pipeline.predictor import Predictor
from kernelpose.pipeline.sources import Source, find_sources

RESULTS = "keypoints.json"
JOURNAL = "keypoints.partial.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument(
        "inputs", metavar="INPUT", nargs="+", type=Path, help="images, videos, or folders of them"
    )
    parser.add_argument(
        "--boxes",
        metavar="FILE",
        type=Path,
        help="persons as COCO detections, [{image_id or file_name, bbox: [x, y, w, h], score}], of "
        "a video with a frame, from 0 on; an image_id is matched to a numeric file name; the whole "
        "image where there is none",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"one of {', '.join(pose_models())} (default: what the checkpoint holds, "
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
        f"attention=window+shift or image_size=384,288; of {', '.join(MODEL_OPTIONS)}",
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
        help=f"one of {', '.join(pose_models())} (default: %(default)s)",
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
    """Predict, write the results, and say where they are; 1 if some of it could not be done."""
    sources = find_sources(args.inputs)
    if any(path.is_dir() and path.resolve() == args.out.resolve() for path in args.inputs):
        raise UserError(f"--out is {args.out}; expected another folder than the images'.")
    detections = [] if args.boxes is None else read_detections(args.boxes)
    _refuse_to_overwrite(
        [path for path in (*(s.path for s in sources), args.boxes, args.checkpoint) if path],
        [args.out / name for name in (RESULTS, JOURNAL, *(s.overlay for s in sources))],
    )
    journal = Journal(args.out / JOURNAL, _settings(args))
    todo = [
        source
        for source in sources
        if journal.outcome(source) is None or not (args.out / source.overlay).is_file()
    ]
    if len(todo) < len(sources):
        print(f"{len(sources) - len(todo)} of {_count(len(sources), 'input')} were done before")
    model = load_model(args.model, args.checkpoint, model_options(args.model_option))
    predictor = Predictor(
        model,
        flip_test=args.flip_test,
        decode=args.decode,
        batch_size=persons_a_pass(model),
    )
    make_directory(args.out)
    annotator = Annotator(predictor, DetectionIndex(detections), args.out)
    start, count = time.perf_counter(), 0
    with journal:
        for source, outcome in annotator.outcomes(todo):
            journal.add(source, outcome)
            count += len(outcome.pictures)
    rate = count / (time.perf_counter() - start)
    found = {source: journal.outcome(source) for source in sources}
    done = {source: outcome for source, outcome in found.items() if outcome is not None}
    results = _results(done)
    write_json(args.out / RESULTS, results)
    journal.remove()
    without = sum(outcome.whole for outcome in done.values()) if args.boxes is not None else 0
    if without:
        print(f"{args.boxes} has no box for {without} of the images: the whole image was taken")
    pictures = sum(len(outcome.pictures) for outcome in done.values())
    print(
        f"{_count(len(results), 'person')} in {_count(pictures, 'image')}"
        + (f", {rate:.3g} images a second" if count else "")
        + f": {args.out / RESULTS}"
    )
    if done:
        first = args.out / next(iter(done)).overlay
        print(f"{_count(len(done), 'overlay')}: {first}{' ...' if len(done) > 1 else ''}")
    return _report([*annotator.failures, *(text for o in done.values() for text in o.refused)])


def _settings(args: argparse.Namespace) -> dict[str, str]:
    """What decides the results, by name: runs that differ in it are not put together."""
    return {
        "INPUT": " ".join(str(path.absolute()) for path in args.inputs),
        "--boxes": "" if args.boxes is None else stamped(args.boxes),
        "--model": args.model or "",
        "--checkpoint": "" if args.checkpoint is None else stamped(args.checkpoint),
        "--model-option": " ".join(sorted(args.model_option)),
        "--flip-test": "given" if args.flip_test else "",
        "--decode": args.decode,
        "the version of kernelpose": kernelpose.__version__,
    }


def _results(done: Mapping[Source, Outcome]) -> list[dict[str, Any]]:
    """The entries of all pictures, each with an ``image_id`` of its own."""
    pictures = [
        (Path() if source.is_video else source.path, entries)
        for source, outcome in done.items()
        for entries in outcome.pictures
    ]
    ids = image_ids([path for path, _ in pictures])
    return [
        {**entry, "image_id": image_id}
        for image_id, (_, entries) in zip(ids, pictures, strict=True)
        for entry in entries
    ]


def _report(problems: Sequence[str]) -> int:
    if not problems:
        return 0
    print(f"kernelpose: {_count(len(problems), 'problem')}, all else is done", file=sys.stderr)
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    return 1


def _refuse_to_overwrite(inputs: Sequence[Path], outputs: Sequence[Path]) -> None:
    read = {path.resolve(): path for path in inputs}
    for output in outputs:
        if output.resolve() in read:
            raise UserError(
                f"--out is {output.parent}; expected a folder where {output.name} does not replace "
                f"the input {read[output.resolve()]}."
            )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
