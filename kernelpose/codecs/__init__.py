"""Keypoints to training targets and network outputs to keypoints."""

from __future__ import annotations

from kernelpose.codecs.coordinates import heatmap_to_input, input_to_heatmap
from kernelpose.codecs.heatmap import encode_msra, encode_udp
from kernelpose.codecs.simcc import encode_simcc, simcc_loss
from kernelpose.ops import decode_heatmap, decode_simcc, flip_merge
from kernelpose.reference.decode_heatmap import DECODE_MODES, heatmap_to_image

__all__ = [
    "DECODE_MODES",
    "decode_heatmap",
    "decode_simcc",
    "encode_msra",
    "encode_simcc",
    "encode_udp",
    "flip_merge",
    "heatmap_to_image",
    "heatmap_to_input",
    "input_to_heatmap",
    "simcc_loss",
]
