"""The model of a command: by its name with random weights, or as a checkpoint describes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kernelpose
from kernelpose.checkpoints import infer_config
from kernelpose.checkpoints.families import FAMILIES, Family, detect
from kernelpose.checkpoints.files import read_state_dict
from kernelpose.data.skeletons import SKELETONS, skeleton_of
from kernelpose.errors import UserError
from kernelpose.models.pose_model import PoseModel

DEFAULT_MODEL = "vitpose-b"


def _pair(text: str) -> tuple[int, int]:
    first, second = text.split(",")
    return int(first), int(second)


MODEL_OPTIONS: dict[str, Any] = {
    "attention": str,
    "window": _pair,
    "num_full_layers": int,
    "patch_stride": int,
    "image_size": _pair,
    "num_heads": int,
    "insertion": str,
    "variant": str,
    "decoder": str,
    "num_keypoints": int,
}
"""Arguments of the models that a user may have to give, and what reads them from text."""


def model_options(texts: Sequence[str]) -> dict[str, Any]:
    """Arguments of a model from "NAME=VALUE", a pair as "8,8".

    Raises UserError for a name that is not of `MODEL_OPTIONS`, or a value of another kind.
    """
    options = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in MODEL_OPTIONS:
            raise UserError(
                f"--model-option is {text}; expected NAME=VALUE with a name of "
                f"{', '.join(MODEL_OPTIONS)}."
            )
        try:
            options[name] = MODEL_OPTIONS[name](value)
        except ValueError as error:
            kind = "two integers, as in 8,8" if MODEL_OPTIONS[name] is _pair else "an integer"
            raise UserError(f"--model-option {name} is {value!r}; expected {kind}.") from error
    return options


def load_model(
    name: str | None, checkpoint: Path | None, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """The model that a checkpoint describes, or a named one with random weights.

    On the GPU if there is one. Says which. Random weights are the same on every call.

    Args:
        name: that of one of `kernelpose.list_models()`; a checkpoint must be of its size.
        checkpoint: a file in any layout; of several data sets' decoders, COCO's is taken, without
            one MPII's, or the one of as many joints as options have for num_keypoints.
        options: arguments of the model's class that go before what name and checkpoint say.

    Raises:
        UserError: no such model, options that it refuses, joints that are neither COCO's nor
            MPII's, or a checkpoint of another size than the name's, or without some of the tensors.
    """
    options = options or {}
    if checkpoint is None:
        model = _random_model(name or DEFAULT_MODEL, options)
    else:
        model = _read(name, checkpoint, options)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def persons_a_pass(model: nn.Module) -> int:
    """How many persons to run at once: enough to fill a GPU; on a CPU few.

    A CPU is full with one, and maps and unmaps the memory of a large batch's activations on every
    layer: ViTPose-S spends 0 % of its time on that with 8 images, 25 % with 128.
    """
    return 64 if next(model.parameters()).is_cuda else 8


def _random_model(name: str, options: Mapping[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    check_options(name, family_of(name), options)
    if "num_keypoints" in options:
        joints = options["num_keypoints"]
        _check_joints(joints, f"--model-option num_keypoints is {joints}")
    model = _built(kernelpose.create_model, name, **options)
    print(f"no --checkpoint: the weights of {name} are random, and so is what it finds")
    return model


def _read(name: str | None, checkpoint: Path, options: Mapping[str, Any]) -> nn.Module:
    if name is not None and name not in pose_models():
        raise UserError(
            f"--model is {name}; expected one of {', '.join(pose_models())} with a checkpoint."
        )
    state_dict = read_state_dict(checkpoint)
    family, _ = detect(state_dict)
    check_options(f"{checkpoint}", family, options)
    config = infer_config(
        state_dict,
        num_heads=options.get("num_heads"),
        patch_stride=options.get("patch_stride"),
    )
    if name is not None:
        _check_size(name, checkpoint, family, config)
    joints, dataset = config["num_keypoints"], None
    if isinstance(joints, Mapping):
        dataset = _dataset(checkpoint, joints, options.get("num_keypoints"))
        joints = joints[dataset]
    joints = options.get("num_keypoints", joints)
    _check_joints(joints, f"{checkpoint} finds {joints} keypoints")
    if "attention" in options:  # then the windows that go with the recorded one do not count
        config = {k: v for k, v in config.items() if k not in ("window", "num_full_layers")}
    model = _built(family.model, **{**config, "num_keypoints": joints, **options})
    report = kernelpose.load_checkpoint(model, state_dict, dataset=dataset)
    if report.missing:
        raise UserError(
            f"{checkpoint} lacks {len(report.missing)} tensors; expected a whole model, with "
            f"{report.missing[0]} for one."
        )
    print(f"{checkpoint}: {report}")
    return model


def _dataset(checkpoint: Path, joints: Mapping[str, int], wanted: int | None) -> str:
    """Which of several data sets' decoders to take."""
    for name, skeleton in SKELETONS.items():
        number = skeleton.num_keypoints
        if joints.get(name) == number and wanted in (None, number):
            return name
    held = ", ".join(f"{name} ({number})" for name, number in joints.items())
    asked = "" if wanted is None else f" of {wanted} joints"
    raise UserError(f"{checkpoint} has decoders of {held}; expected coco's or mpii's{asked}.")


def _check_joints(joints: int, what: str) -> None:
    if skeleton_of(joints) is None:
        known = " or ".join(f"{skeleton.num_keypoints}" for skeleton in SKELETONS.values())
        raise UserError(f"{what}; expected {known} (COCO or MPII), to be drawn and written.")


def pose_models() -> list[str]:
    """Names of the zoo's models, which all find keypoints."""
    return [model.name for model in kernelpose.list_models()]


def family_of(name: str) -> Family | None:
    """The family of a model of the zoo; None for a name that it does not know."""
    return next((family for family in FAMILIES if name in family.sizes), None)


def check_options(which: str, family: Family | None, options: Mapping[str, Any]) -> None:
    """Raises UserError for a backbone alone, and for an option that a family's models lack."""
    if family is None:
        return
    if not issubclass(family.model, PoseModel):
        raise UserError(f"{which} is a backbone alone; expected a model that finds keypoints.")
    known = [name for name in MODEL_OPTIONS if name in signature(family.model).parameters]
    for option in options:
        if option not in known:
            raise UserError(
                f"--model-option is {option}; expected one of {', '.join(known)} for {which}."
            )


def _check_size(name: str, checkpoint: Path, family: Family, config: Mapping[str, Any]) -> None:
    told = ("embed_dim", "embed_dims", "depth", "depths", "layout", "insertion", "features_list")
    found = {argument: config[argument] for argument in told if argument in config}
    wanted = {k: v for k, v in family.sizes.get(name, {}).items() if k in found}
    if wanted != found:
        has = ", ".join(f"{argument} {value}" for argument, value in found.items())
        raise UserError(
            f"--model is {name}; expected a {family.model.__name__} of {has}, as {checkpoint} has."
        )


def _built(build: Callable[..., nn.Module], *args: Any, **options: Any) -> nn.Module:
    try:
        return build(*args, **options)
    except ValueError as error:
        raise UserError(str(error)) from error
