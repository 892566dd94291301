"""From pictures and boxes to keypoints."""

from __future__ import annotations

from kernelpose.pipeline.predictor import Poses, Predictor

__all__ = ["Poses", "Predictor"]
