"""The ops as functions; each is `kernelpose.ops.<op>` and its file `kernelpose/ops/<op>.py`."""

from kernelpose.ops.crop_normalize import crop_normalize
from kernelpose.ops.window_attention import window_attention

__all__ = ["crop_normalize", "window_attention"]
