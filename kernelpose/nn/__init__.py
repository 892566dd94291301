"""Drop-in modules: constructor, parameter names and state_dict of the eager modules."""

from kernelpose.nn.cru import CRU
from kernelpose.nn.grn import GRN
from kernelpose.nn.local_perception import LocalPerception
from kernelpose.nn.multi_scale import MultiScaleModule
from kernelpose.nn.scconv import ScConv
from kernelpose.nn.sru import SRU
from kernelpose.nn.window_attention import WindowAttention

__all__ = [
    "CRU",
    "GRN",
    "SRU",
    "LocalPerception",
    "MultiScaleModule",
    "ScConv",
    "WindowAttention",
]
