"""Boxes to crops: center and scale, and the affine maps into the model's input."""

from __future__ import annotations

from kernelpose.reference.crop_normalize import box_to_center_scale, can_be_cropped, warp_matrix

__all__ = ["box_to_center_scale", "can_be_cropped", "warp_matrix"]
