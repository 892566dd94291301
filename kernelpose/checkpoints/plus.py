"""ViTPose+ and multi-data-set checkpoints: experts merged into the MLP, decoders by name."""

from __future__ import annotations

import re

import torch

from kernelpose.checkpoints.files import StateDict
from kernelpose.errors import UserError

# The order of the released experts and of keypoint_head, associate_keypoint_heads.0, .1, ...
DATASETS = ("coco", "aic", "mpii", "ap10k", "apt36k", "wholebody")

HEAD = "keypoint_head."
HEADS = "keypoint_heads."
_ASSOCIATE = "associate_keypoint_heads."
_EXPERT = re.compile(r"(backbone\.blocks\.\d+\.mlp)\.experts\.(\d+)\.(weight|bias)")


def merge_experts(tensors: StateDict, dataset: str | None) -> list[str]:
    """Puts one data set's expert into fc2, in place: fc2 = cat([fc2, expert]).

    The result equals the mixture run for that data set, at a sixth of its expert work. The
    decoders of the other data sets were trained with other experts, so they go too.

    Args:
        tensors: in our names; without experts nothing happens.
        dataset: one of DATASETS, "coco" by default.

    Returns notes for the report. Raises UserError for another data set, or one without expert.
    """
    found = {name: match for name in tensors if (match := _EXPERT.fullmatch(name))}
    if not found:
        return []
    dataset = dataset or DATASETS[0]
    if dataset not in DATASETS:
        raise UserError(f"dataset is {dataset!r}; expected one of {', '.join(DATASETS)}.")
    number = DATASETS.index(dataset)
    for mlp, kind in dict.fromkeys((match[1], match[3]) for match in found.values()):
        shared, expert = f"{mlp}.fc2.{kind}", f"{mlp}.experts.{number}.{kind}"
        for name in (shared, expert):
            if name not in tensors:
                raise UserError(f"{name} is missing; expected for the data set {dataset}.")
        if tensors[shared].shape[1:] != tensors[expert].shape[1:]:
            raise UserError(
                f"{expert} has shape {tuple(tensors[expert].shape)}; expected one that fits "
                f"{shared}, {tuple(tensors[shared].shape)}."
            )
        tensors[shared] = torch.cat([tensors[shared], tensors[expert]])
    for name in found:
        del tensors[name]
    experts = 1 + max(int(match[2]) for match in found.values())
    notes = [f"{experts} experts: that of {dataset} merged into fc2, the others dropped"]
    if decoder_names(tensors):
        chosen = select_decoder(tensors, dataset)
        tensors.clear()
        tensors.update(chosen)
        notes.append(f"decoder of {dataset} taken, the others dropped")
    elif dataset != DATASETS[0]:
        notes.append(f"the one decoder was kept, which need not be that of {dataset}")
    return notes


def decoder_names(tensors: StateDict) -> list[str]:
    """The data sets of keypoint_heads.<data set>.*, in the order of the state_dict."""
    return list(dict.fromkeys(name.split(".")[1] for name in tensors if name.startswith(HEADS)))


def select_decoder(tensors: StateDict, dataset: str | None) -> StateDict:
    """The tensors with one of several decoders, as keypoint_head.*; unchanged if they have one.

    Args:
        dataset: "coco" by default.

    Raises UserError if that is not among them.
    """
    names = decoder_names(tensors)
    if not names:
        return tensors
    dataset = dataset or DATASETS[0]
    if dataset not in names:
        raise UserError(f"dataset is {dataset!r}; expected one of {', '.join(names)}.")
    chosen = f"{HEADS}{dataset}."
    return {
        name.replace(chosen, HEAD, 1): tensor
        for name, tensor in tensors.items()
        if name.startswith(chosen) or not name.startswith(HEADS)
    }


def split_decoders(tensors: StateDict) -> None:
    """Official to ours, in place: names the decoders, if there are several."""
    if not any(name.startswith(_ASSOCIATE) for name in tensors):
        return
    for name in list(tensors):
        if name.startswith(HEAD):
            tensors[f"{HEADS}{DATASETS[0]}.{name.removeprefix(HEAD)}"] = tensors.pop(name)
        elif name.startswith(_ASSOCIATE):
            number, rest = name.removeprefix(_ASSOCIATE).split(".", 1)
            if int(number) + 1 < len(DATASETS):
                tensors[f"{HEADS}{DATASETS[int(number) + 1]}.{rest}"] = tensors.pop(name)


def join_decoders(tensors: StateDict) -> StateDict:
    """Ours to official: several decoders back to keypoint_head and associate_keypoint_heads.

    Raises UserError if they are not the first of DATASETS without a gap.
    """
    names = decoder_names(tensors)
    if not names:
        return tensors
    if set(names) != set(DATASETS[: len(names)]):
        raise UserError(
            f"dataset is None for decoders of {', '.join(names)}; expected one of them, as the "
            f"official layout names {', '.join(DATASETS)} alone, without a gap."
        )
    prefixes = {
        f"{HEADS}{name}.": f"{_ASSOCIATE}{number - 1}." if number else HEAD
        for number, name in enumerate(DATASETS[: len(names)])
    }
    joined = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        joined[prefixes.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return joined
