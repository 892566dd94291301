"""Drop-in modules: constructor, parameter names and state_dict of the eager modules."""

from kernelpose.nn.window_attention import WindowAttention

__all__ = ["WindowAttention"]
