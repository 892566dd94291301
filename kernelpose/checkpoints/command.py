"""`kernelpose convert IN OUT --to LAYOUT`."""

from __future__ import annotations

import argparse
from pathlib import Path

from kernelpose.checkpoints.convert import convert_checkpoint
from kernelpose.checkpoints.layouts import LAYOUTS
from kernelpose.checkpoints.plus import DATASETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the subcommand."""
    parser.add_argument("source", metavar="IN", type=Path, help="checkpoint in any layout")
    parser.add_argument(
        "target",
        metavar="OUT",
        type=Path,
        help="file to write; a name that ends in .safetensors gets that format",
    )
    parser.add_argument("--to", required=True, choices=tuple(LAYOUTS), help="layout of OUT")
    parser.add_argument(
        "--dataset",
        help="whose expert and decoder to take from a ViTPose+ checkpoint "
        f"({', '.join(DATASETS)}; default: coco)",
    )
    parser.add_argument(
        "--grid",
        nargs=2,
        type=int,
        metavar=("ROWS", "COLUMNS"),
        help="token grid of the position table, if it is neither 4:3 portrait nor square",
    )


def run(args: argparse.Namespace) -> int:
    """Converts, and prints the report."""
    grid = (args.grid[0], args.grid[1]) if args.grid else None
    report = convert_checkpoint(args.source, args.target, args.to, dataset=args.dataset, grid=grid)
    print(report)
    print(f"wrote {args.target} ({args.to} layout)")
    return 0
