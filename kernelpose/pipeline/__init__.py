"""From pictures and boxes to keypoints."""

from __future__ import annotations

from kernelpose.pipeline.poses import Poses
from kernelpose.pipeline.predictor import Predictor

__all__ = ["Poses", "Predictor"]
