"""Names of ViTPose's tensors in each layout, and the translation between them."""

from __future__ import annotations

import re
from collections.abc import Iterable

# (ours, mmpose 1.x, transformers); "#" is a number. The official names are ours.
_ENCODER = (
    ("backbone.pos_embed", "backbone.pos_embed", "backbone.embeddings.position_embeddings"),
    (
        "backbone.patch_embed.proj",
        "backbone.patch_embed.projection",
        "backbone.embeddings.patch_embeddings.projection",
    ),
    (
        "backbone.blocks.#.norm1",
        "backbone.layers.#.ln1",
        "backbone.encoder.layer.#.layernorm_before",
    ),
    (
        "backbone.blocks.#.norm2",
        "backbone.layers.#.ln2",
        "backbone.encoder.layer.#.layernorm_after",
    ),
    (
        "backbone.blocks.#.attn.proj",
        "backbone.layers.#.attn.proj",
        "backbone.encoder.layer.#.attention.output.dense",
    ),
    (
        "backbone.blocks.#.mlp.fc1",
        "backbone.layers.#.ffn.layers.0.0",
        "backbone.encoder.layer.#.mlp.fc1",
    ),
    (
        "backbone.blocks.#.mlp.fc2",
        "backbone.layers.#.ffn.layers.1",
        "backbone.encoder.layer.#.mlp.fc2",
    ),
    ("backbone.last_norm", "backbone.ln1", "backbone.layernorm"),
)
_QKV = "backbone.blocks.#.attn.qkv"
_EXPERTS = "backbone.blocks.#.mlp.experts.#"
_DECONV = "keypoint_head.deconv_layers.#"
_FINAL = "keypoint_head.final_layer"

OFFICIAL_NAMES = (
    *((ours, ours) for ours, _, _ in _ENCODER),
    (_QKV, _QKV),
    (_EXPERTS, _EXPERTS),
    (_DECONV, _DECONV),
    (_FINAL, _FINAL),
    *(
        (f"associate_keypoint_heads.#.{part}", f"associate_keypoint_heads.#.{part}")
        for part in ("deconv_layers.#", "final_layer")
    ),
)
MMPOSE1_NAMES = (
    *((ours, theirs) for ours, theirs, _ in _ENCODER),
    (_QKV, "backbone.layers.#.attn.qkv"),
    (_DECONV, "head.deconv_layers.#"),
    (_FINAL, "head.final_layer"),
)
TRANSFORMERS_NAMES = (
    *((ours, theirs) for ours, _, theirs in _ENCODER),
    # Thirds of our qkv, joined and cut in layouts.py.
    *(
        (
            f"backbone.blocks.#.attn.{third}",
            f"backbone.encoder.layer.#.attention.attention.{third}",
        )
        for third in ("query", "key", "value")
    ),
    (_EXPERTS, "backbone.encoder.layer.#.mlp.experts.#"),
    ("keypoint_head.deconv_layers.0", "head.deconv1"),
    ("keypoint_head.deconv_layers.1", "head.batchnorm1"),
    ("keypoint_head.deconv_layers.3", "head.deconv2"),
    ("keypoint_head.deconv_layers.4", "head.batchnorm2"),
    (_FINAL, "head.conv"),
)

_LEAF = r"(|\.weight|\.bias|\.running_mean|\.running_var|\.num_batches_tracked)"


class Renaming:
    """Translates names both ways by a table of pairs (ours, theirs)."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        pairs = tuple(pairs)
        self._to_ours = [(_pattern(theirs), ours) for ours, theirs in pairs]
        self._to_theirs = [(_pattern(ours), theirs) for ours, theirs in pairs]

    def ours(self, name: str) -> str | None:
        """Our name of a tensor, or None for one that the table does not know."""
        return _translate(name, self._to_ours)

    def theirs(self, name: str) -> str | None:
        """Their name of a tensor, or None for one that the table does not know."""
        return _translate(name, self._to_theirs)


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\#", r"(\d+)") + _LEAF)


def _translate(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in rules:
        match = pattern.fullmatch(name)
        if match:
            *numbers, leaf = match.groups()
            for number in numbers:
                template = template.replace("#", number, 1)
            return template + leaf
    return None
