"""Keypoints to training targets and network outputs to keypoints."""

from __future__ import annotations

from kernelpose.codecs.coordinates import heatmap_to_image, heatmap_to_input, input_to_heatmap
from kernelpose.codecs.decode import DECODE_MODES, decode_heatmap
from kernelpose.codecs.flip import flip_back, flip_merge
from kernelpose.codecs.heatmap import encode_msra, encode_udp
from kernelpose.codecs.simcc import decode_simcc, encode_simcc

__all__ = [
    "DECODE_MODES",
    "decode_heatmap",
    "decode_simcc",
    "encode_msra",
    "encode_simcc",
    "encode_udp",
    "flip_back",
    "flip_merge",
    "heatmap_to_image",
    "heatmap_to_input",
    "input_to_heatmap",
]
