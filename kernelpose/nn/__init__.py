"""Drop-in modules: constructor, parameter names and state_dict of the eager modules."""

from kernelpose.nn.grn import GRN
from kernelpose.nn.window_attention import WindowAttention

__all__ = ["GRN", "WindowAttention"]
