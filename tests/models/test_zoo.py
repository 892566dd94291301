"""The zoo: names, near matches, registration."""

from __future__ import annotations

import pytest
import torch

import kernelpose
from kernelpose.models import ViTPose, create_model, list_models
from kernelpose.models.zoo import register


def test_the_package_offers_the_zoo() -> None:
    assert kernelpose.create_model is create_model
    assert kernelpose.list_models() == list_models()


def test_vitpose_is_listed_from_small_to_large() -> None:
    names = [name for name in list_models() if name.startswith("vitpose-")]
    assert names == ["vitpose-s", "vitpose-b", "vitpose-l", "vitpose-h"]


@pytest.mark.parametrize(
    ("name", "dim", "depth", "heads", "drop_path"),
    [
        ("vitpose-s", 384, 12, 12, 0.10),
        ("vitpose-b", 768, 12, 12, 0.30),
        ("vitpose-l", 1024, 24, 16, 0.50),
        ("vitpose-h", 1280, 32, 16, 0.55),
    ],
)
def test_sizes(name: str, dim: int, depth: int, heads: int, drop_path: float) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert isinstance(model, ViTPose)
    blocks = model.backbone.blocks
    assert len(blocks) == depth
    assert {block.attn.num_heads for block in blocks} == {heads}
    assert blocks[0].norm1.weight.shape == (dim,)
    assert blocks[0].mlp.fc1.weight.shape == (4 * dim, dim)
    assert {block.norm2.eps for block in blocks} == {1e-6}
    ramp = torch.linspace(0, drop_path, depth).tolist()
    assert [block.drop_path.probability for block in blocks] == pytest.approx(ramp)


def test_an_unknown_name_is_answered_with_the_near_ones() -> None:
    with pytest.raises(
        kernelpose.UserError, match=r"name is 'vitpose_b'; expected .*, such as vitpose-b"
    ):
        create_model("vitpose_b")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(
        ValueError, match="names hold 'vitpose-b'; expected one that is not registered"
    ):
        register("vitpose-b")(lambda name, **options: torch.nn.Identity())


def test_options_override_the_table() -> None:
    with torch.device("meta"):
        model = create_model("vitpose-s", drop_path=0.0, image_size=(384, 288), num_keypoints=133)
    assert model.heatmap_size == (96, 72)
    assert model.backbone.pos_embed.shape == (1, 24 * 18 + 1, 384)
    assert model.keypoint_head.final_layer.weight.shape[0] == 133
    assert model.backbone.blocks[-1].drop_path.probability == 0.0
