"""The ops as functions; each is `kernelpose.ops.<op>` and its file `kernelpose/ops/<op>.py`."""

from kernelpose.ops.add_layer_norm import add_layer_norm
from kernelpose.ops.cascaded_attention import cascaded_attention
from kernelpose.ops.channel_fuse import channel_fuse
from kernelpose.ops.crop_normalize import crop_normalize
from kernelpose.ops.decode_heatmap import decode_heatmap
from kernelpose.ops.decode_simcc import decode_simcc
from kernelpose.ops.dilated_pyramid import dilated_pyramid
from kernelpose.ops.dual_gate import dual_gate
from kernelpose.ops.dwconv_gelu import dwconv_gelu
from kernelpose.ops.flip_merge import flip_merge
from kernelpose.ops.grn import grn
from kernelpose.ops.heatmap_loss import heatmap_loss
from kernelpose.ops.inverted_bottleneck import inverted_bottleneck
from kernelpose.ops.multi_granularity import multi_granularity
from kernelpose.ops.reduced_attention import reduced_attention
from kernelpose.ops.spatial_gate import spatial_gate
from kernelpose.ops.window_attention import window_attention

__all__ = [
    "add_layer_norm",
    "cascaded_attention",
    "channel_fuse",
    "crop_normalize",
    "decode_heatmap",
    "decode_simcc",
    "dilated_pyramid",
    "dual_gate",
    "dwconv_gelu",
    "flip_merge",
    "grn",
    "heatmap_loss",
    "inverted_bottleneck",
    "multi_granularity",
    "reduced_attention",
    "spatial_gate",
    "window_attention",
]
