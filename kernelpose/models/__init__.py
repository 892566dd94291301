"""Pose models: `create_model(name, ...)`, `list_models()` and the classes behind the names."""

from kernelpose.models.hevitpose import HEViTPose
from kernelpose.models.hrpvt import HRPVT
from kernelpose.models.mitpose import MiTPOSE
from kernelpose.models.mobilevit import MobileViT
from kernelpose.models.mobilevitpose import MobileViTPose
from kernelpose.models.pvtv2 import PVTv2
from kernelpose.models.table import ModelInfo
from kernelpose.models.vitpose import ViTPose
from kernelpose.models.zoo import create_model, list_models

__all__ = [
    "HRPVT",
    "HEViTPose",
    "MiTPOSE",
    "MobileViT",
    "MobileViTPose",
    "ModelInfo",
    "PVTv2",
    "ViTPose",
    "create_model",
    "list_models",
]
