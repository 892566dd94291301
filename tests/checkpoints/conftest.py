"""Small checkpoints in each layout, made from names written out here, not by the converters."""

from __future__ import annotations

import pytest
import torch

StateDict = dict[str, torch.Tensor]

DIM, DEPTH, HIDDEN, JOINTS, TOKENS, WIDTH = 12, 2, 20, 5, 12, 6


class Maker:
    """Random tensors under given names; the same seed for each layout."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.state: StateDict = {}

    def add(self, name: str, *shape: int) -> None:
        self.state[name] = torch.randn(*shape, generator=self.generator)

    def layer(self, name: str, *shape: int) -> None:
        self.add(f"{name}.weight", *shape)
        self.add(f"{name}.bias", shape[0])

    def norm(self, name: str) -> None:
        self.layer(name, WIDTH)
        self.add(f"{name}.running_mean", WIDTH)
        self.state[f"{name}.running_var"] = torch.rand(WIDTH, generator=self.generator) + 0.5
        self.state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def classic(self, names: tuple[str, str, str, str, str], joints: int = JOINTS) -> None:
        deconv1, norm1, deconv2, norm2, final = names
        self.add(f"{deconv1}.weight", DIM, WIDTH, 4, 4)
        self.norm(norm1)
        self.add(f"{deconv2}.weight", WIDTH, WIDTH, 4, 4)
        self.norm(norm2)
        self.layer(final, joints, WIDTH, 1, 1)


def official(
    decoder: str = "classic", heads: tuple[int, ...] = (JOINTS,), part: int = 0
) -> StateDict:
    """ViTAE-Transformer/ViTPose; `part` is the width of the six experts."""
    make = Maker()
    make.add("backbone.pos_embed", 1, TOKENS + 1, DIM)
    make.layer("backbone.patch_embed.proj", DIM, 3, 16, 16)
    for i in range(DEPTH):
        block = f"backbone.blocks.{i}"
        make.layer(f"{block}.norm1", DIM)
        make.layer(f"{block}.attn.qkv", 3 * DIM, DIM)
        make.layer(f"{block}.attn.proj", DIM, DIM)
        make.layer(f"{block}.norm2", DIM)
        make.layer(f"{block}.mlp.fc1", HIDDEN, DIM)
        make.layer(f"{block}.mlp.fc2", DIM - part, HIDDEN)
        for expert in range(6 if part else 0):
            make.layer(f"{block}.mlp.experts.{expert}", part, HIDDEN)
    make.layer("backbone.last_norm", DIM)
    for number, joints in enumerate(heads):
        head = f"associate_keypoint_heads.{number - 1}" if number else "keypoint_head"
        if decoder == "classic":
            deconvs = tuple(f"{head}.deconv_layers.{i}" for i in (0, 1, 3, 4))
            make.classic((*deconvs, f"{head}.final_layer"), joints)
        else:
            make.layer(f"{head}.final_layer", joints, DIM, 3, 3)
    return make.state


def mmpose1(decoder: str = "classic") -> StateDict:
    """mmpose 1.x with mmpretrain's backbone."""
    make = Maker()
    make.add("backbone.pos_embed", 1, TOKENS, DIM)
    make.layer("backbone.patch_embed.projection", DIM, 3, 16, 16)
    for i in range(DEPTH):
        block = f"backbone.layers.{i}"
        make.layer(f"{block}.ln1", DIM)
        make.layer(f"{block}.attn.qkv", 3 * DIM, DIM)
        make.layer(f"{block}.attn.proj", DIM, DIM)
        make.layer(f"{block}.ln2", DIM)
        make.layer(f"{block}.ffn.layers.0.0", HIDDEN, DIM)
        make.layer(f"{block}.ffn.layers.1", DIM, HIDDEN)
    make.layer("backbone.ln1", DIM)
    if decoder == "classic":
        deconvs = tuple(f"head.deconv_layers.{i}" for i in (0, 1, 3, 4))
        make.classic((*deconvs, "head.final_layer"))
    else:
        make.layer("head.final_layer", JOINTS, DIM, 3, 3)
    return make.state


def transformers(decoder: str = "classic", part: int = 0) -> StateDict:
    """VitPoseForPoseEstimation."""
    make = Maker()
    make.add("backbone.embeddings.position_embeddings", 1, TOKENS + 1, DIM)
    make.layer("backbone.embeddings.patch_embeddings.projection", DIM, 3, 16, 16)
    for i in range(DEPTH):
        block = f"backbone.encoder.layer.{i}"
        for third in ("query", "key", "value"):
            make.layer(f"{block}.attention.attention.{third}", DIM, DIM)
        make.layer(f"{block}.attention.output.dense", DIM, DIM)
        make.layer(f"{block}.mlp.fc1", HIDDEN, DIM)
        make.layer(f"{block}.mlp.fc2", DIM - part, HIDDEN)
        for expert in range(6 if part else 0):
            make.layer(f"{block}.mlp.experts.{expert}", part, HIDDEN)
        make.layer(f"{block}.layernorm_before", DIM)
        make.layer(f"{block}.layernorm_after", DIM)
    make.layer("backbone.layernorm", DIM)
    if decoder == "classic":
        names = ("deconv1", "batchnorm1", "deconv2", "batchnorm2", "conv")
        make.classic(tuple(f"head.{name}" for name in names))
    else:
        make.layer("head.conv", JOINTS, DIM, 3, 3)
    return make.state


def kernelpose(decoder: str = "classic") -> StateDict:
    """Ours: the official names and the grid."""
    return {**official(decoder), "backbone.pos_grid": torch.tensor([4, 3])}


MAKERS = {
    "official": official,
    "mmpose1": mmpose1,
    "transformers": transformers,
    "kernelpose": kernelpose,
}


@pytest.fixture(params=MAKERS)
def layout(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def make() -> dict[str, object]:
    """layout -> function of the decoder's name that makes a small state_dict."""
    return dict(MAKERS)
