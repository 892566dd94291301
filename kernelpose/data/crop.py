"""Crops of an image through affine maps, and their normalisation."""

from __future__ import annotations

from kernelpose.reference.crop_normalize import IMAGENET_MEAN, IMAGENET_STD, crop_image, normalize

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "crop_image", "normalize"]
