"""Checkpoints of all models and layouts: load them, infer their sizes, convert between them."""

from kernelpose.checkpoints.convert import convert_checkpoint, convert_state_dict
from kernelpose.checkpoints.families import detect_layout
from kernelpose.checkpoints.infer import infer_class, infer_config
from kernelpose.checkpoints.layouts import LAYOUTS
from kernelpose.checkpoints.load import load_checkpoint
from kernelpose.checkpoints.report import CheckpointReport

__all__ = [
    "LAYOUTS",
    "CheckpointReport",
    "convert_checkpoint",
    "convert_state_dict",
    "detect_layout",
    "infer_class",
    "infer_config",
    "load_checkpoint",
]
