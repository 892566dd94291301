"""Drop-in modules: constructor, parameter names and state_dict of the eager modules."""

from kernelpose.nn.add_layer_norm import AddLayerNorm
from kernelpose.nn.cascaded_attention import CascadedGroupSRAttention
from kernelpose.nn.conv_norm import ConvNorm
from kernelpose.nn.cru import CRU
from kernelpose.nn.dilated_pyramid import DilatedPyramid
from kernelpose.nn.grn import GRN
from kernelpose.nn.hrpm_v1 import HRPMv1
from kernelpose.nn.hrpm_v2 import HRPMv2
from kernelpose.nn.local_perception import LocalPerception
from kernelpose.nn.mix_ffn import MixFFN
from kernelpose.nn.mobilevit_block import MobileViTBlock
from kernelpose.nn.multi_scale import MultiScaleModule
from kernelpose.nn.scconv import ScConv
from kernelpose.nn.sr_attention import SRAttention
from kernelpose.nn.sru import SRU
from kernelpose.nn.window_attention import WindowAttention

__all__ = [
    "CRU",
    "GRN",
    "SRU",
    "AddLayerNorm",
    "CascadedGroupSRAttention",
    "ConvNorm",
    "DilatedPyramid",
    "HRPMv1",
    "HRPMv2",
    "LocalPerception",
    "MixFFN",
    "MobileViTBlock",
    "MultiScaleModule",
    "SRAttention",
    "ScConv",
    "WindowAttention",
]
