"""PVT v2's and HRPVT's checkpoints: in timm's names, which are ours, in the released code's and in
mmpose's.

The released code's (whai362/PVT) differ in names alone. mmpose's `PyramidVisionTransformerV2`
differs from timm's in three things beside names: queries, keys and values are one in_proj (q, then
kv), the linears of the feed-forward are 1x1 convolutions, and every LayerNorm has eps 1e-6, where
timm's patch embeddings and reductions have 1e-5.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from kernelpose.checkpoints.files import StateDict
from kernelpose.checkpoints.layouts import Imported, Layout
from kernelpose.checkpoints.naming import Renaming
from kernelpose.checkpoints.plus import HEAD, HEADS, decoder_names
from kernelpose.checkpoints.shapes import decoder_of, numbered, recorded_size, sizes_of
from kernelpose.errors import UserError
from kernelpose.models.hrpvt import INSERTIONS, blocks_with_hrpm
from kernelpose.models.pvtv2 import DROP_PATH, STRIDE
from kernelpose.models.pvtv2 import SIZES as PVT_SIZES

BACKBONE = "backbone."

# (ours, mmpose's); "#" is a number.
_BLOCK, _THEIRS = "stages.#.blocks.#", "layers.#.1.#"
_ENCODER = (
    ("patch_embed.proj", "layers.0.0.projection"),
    ("patch_embed.norm", "layers.0.0.norm"),
    ("stages.#.downsample.proj", "layers.#.0.projection"),
    ("stages.#.downsample.norm", "layers.#.0.norm"),
    ("stages.#.norm", "layers.#.2"),
    (f"{_BLOCK}.norm1", f"{_THEIRS}.norm1"),
    (f"{_BLOCK}.norm2", f"{_THEIRS}.norm2"),
    (f"{_BLOCK}.attn.in_proj_weight", f"{_THEIRS}.attn.attn.in_proj_weight"),
    (f"{_BLOCK}.attn.in_proj_bias", f"{_THEIRS}.attn.attn.in_proj_bias"),
    (f"{_BLOCK}.attn.proj", f"{_THEIRS}.attn.attn.out_proj"),
    (f"{_BLOCK}.attn.sr", f"{_THEIRS}.attn.sr"),
    (f"{_BLOCK}.attn.norm", f"{_THEIRS}.attn.norm"),
    (f"{_BLOCK}.mlp.fc1", f"{_THEIRS}.ffn.layers.0"),
    (f"{_BLOCK}.mlp.dwconv", f"{_THEIRS}.ffn.layers.1"),
    (f"{_BLOCK}.mlp.fc2", f"{_THEIRS}.ffn.layers.4"),
)
_PARTS = (
    *("norm1", "norm2", "attn.q", "attn.kv", "attn.proj", "attn.sr", "attn.norm"),
    *("mlp.fc1", "mlp.dwconv", "mlp.fc2"),
)


def _released_names() -> Iterator[tuple[str, str]]:
    """(ours, the released code's), which counts stages from 1."""
    for stage in range(4):
        theirs = stage + 1
        embed = f"stages.{stage}.downsample" if stage else "patch_embed"
        yield from ((f"{embed}.{part}", f"patch_embed{theirs}.{part}") for part in ("proj", "norm"))
        yield f"stages.{stage}.norm", f"norm{theirs}"
        for part in _PARTS:
            inner = ".dwconv" if part == "mlp.dwconv" else ""
            yield f"stages.{stage}.blocks.#.{part}", f"block{theirs}.#.{part}{inner}"


_HEAD = ("final_layer", "mlp_head_x", "mlp_head_y", "deconv_layers.#")
_LINEAR = re.compile(r".*\.mlp\.fc[12]\.weight")


class Timm(Layout):
    """Ours and timm's: a backbone alone, or a whole model's with "backbone." before it."""

    def __init__(self, prefix: str) -> None:
        self.mark = f"{prefix}stages.0.blocks.0.attn.q.weight"


class Released(Layout):
    """The released code's: a backbone alone, or with "backbone." before it."""

    name = "official"

    def __init__(self, prefix: str) -> None:
        self.mark = f"{prefix}block1.0.attn.q.weight"
        self.renaming = Renaming(
            [
                *((prefix + ours, prefix + theirs) for ours, theirs in _released_names()),
                *((HEAD + part, HEAD + part) for part in _HEAD),
            ]
        )


class MMPose(Layout):
    """mmpose's and mmdetection's."""

    name = "mmpose1"
    wraps = True

    def __init__(self, prefix: str) -> None:
        self.mark = f"{prefix}layers.0.1.0.attn.attn.in_proj_weight"
        self.renaming = Renaming(
            [
                *((prefix + ours, prefix + theirs) for ours, theirs in _ENCODER),
                *((HEAD + part, f"head.{part}") for part in _HEAD),
            ]
        )

    def assemble(self, imported: Imported, dataset: str | None) -> None:
        tensors = imported.tensors
        for name in [name for name in tensors if ".attn.in_proj_" in name]:
            joined = tensors.pop(name)
            if joined.dim() == 0 or joined.shape[0] % 3:
                raise UserError(
                    f"{name} has shape {tuple(joined.shape)}; expected queries, keys and values of "
                    "one width."
                )
            q, k, v = joined.chunk(3)
            tensors[name.replace("in_proj_", "q.")] = q.clone()
            tensors[name.replace("in_proj_", "kv.")] = torch.cat((k, v))
        for name, tensor in tensors.items():
            if _LINEAR.fullmatch(name) and tensor.dim() == 4:
                tensors[name] = tensor.flatten(1)

    def disassemble(self, tensors: StateDict) -> StateDict:
        for name in [name for name in tensors if ".attn.q." in name]:
            others = name.replace(".q.", ".kv.")
            if others in tensors:
                joined = torch.cat((tensors.pop(name), tensors.pop(others)))
                tensors[name.replace(".q.", ".in_proj_")] = joined
        for name, tensor in tensors.items():
            if _LINEAR.fullmatch(name):
                tensors[name] = tensor[:, :, None, None]
        return tensors


def config_of_pvtv2(tensors: StateDict, **_: Any) -> dict[str, Any]:
    """Arguments of PVTv2 for tensors in our names; the heads are those of every PVT v2."""
    return _encoder(tensors, "")


def config_of_hrpvt(tensors: StateDict, **_: Any) -> dict[str, Any]:
    """Arguments of HRPVT for tensors in our names; the heads are those of every PVT v2."""
    encoder = _encoder(tensors, BACKBONE)
    decoder = decoder_of(tensors)
    simcc = decoder["decoder"] in (None, "simcc")
    image_size = _image_size(tensors)
    config = {
        **encoder,
        "insertion": _insertion(tensors, encoder["depths"]),
        "hrpm_v1": "backbone.stem.proj.weight" in tensors,
        **decoder,
        "decoder": "simcc" if simcc else decoder["decoder"],
        "image_size": image_size,
    }
    if decoder["decoder"] == "simcc":
        config["split_ratio"] = _bins(tensors)[0] / image_size[1]
    return config


def _encoder(tensors: StateDict, prefix: str) -> dict[str, Any]:
    dims, depths, reductions, ratios = [], [], [], []
    for stage in range(4):
        name = f"{prefix}stages.{stage}.blocks."
        depths.append(numbered(tensors, re.compile(re.escape(name) + r"(\d+)\."), "blocks"))
        (dim,) = sizes_of(tensors, f"{name}0.attn.q.weight", 2, (0,))
        dims.append(dim)
        sr = f"{name}0.attn.sr.weight"
        reductions.append(sizes_of(tensors, sr, 4, (2,))[0] if sr in tensors else 1)
        (hidden,) = sizes_of(tensors, f"{name}0.mlp.fc1.weight", 2, (0,))
        ratios.append(hidden / dim)
    sizes = {"embed_dims": tuple(dims), "depths": tuple(depths)}
    return {
        **sizes,
        "sr_ratios": tuple(reductions),
        "mlp_ratios": tuple(ratios),
        "drop_path": DROP_PATH if sizes in PVT_SIZES.values() else 0.0,
    }


def _insertion(tensors: StateDict, depths: tuple[int, ...]) -> str:
    found = re.compile(r"backbone\.stages\.(\d)\.blocks\.(\d+)\.hrpm\.up\.weight")
    blocks = {(int(m[1]), int(m[2])) for name in tensors if (m := found.fullmatch(name))}
    for insertion in INSERTIONS:
        expected = enumerate(blocks_with_hrpm(insertion, depths))
        if blocks == {(stage, block) for stage, layers in expected for block in layers}:
            return insertion
    raise UserError(
        f"checkpoint has HRPM v2 after {len(blocks)} blocks; expected those of an insertion of "
        f"{', '.join(INSERTIONS)}."
    )


def _bins(tensors: StateDict) -> tuple[int, int]:
    """Of columns and rows, of a SimCC head."""
    names = decoder_names(tensors)
    head = f"{HEADS}{names[0]}." if names else HEAD
    columns, rows = (
        sizes_of(tensors, f"{head}mlp_head_{axis}.weight", 2, (0,))[0] for axis in "xy"
    )
    return columns, rows


def _image_size(tensors: StateDict) -> tuple[int, int]:
    """As recorded; else by a SimCC head of the usual two bins a pixel; else the usual size."""
    recorded = recorded_size(tensors, STRIDE)
    if recorded is not None:
        return recorded
    if decoder_of(tensors)["decoder"] == "simcc":
        columns, rows = _bins(tensors)
        return rows // 2, columns // 2
    return 256, 192
