"""Checkpoints of MobileViTPose: recognised, loaded, rebuilt; backbones of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kernelpose
from kernelpose.checkpoints import convert_checkpoint, infer_class, infer_config
from kernelpose.errors import UserError
from kernelpose.models import MobileViT, MobileViTPose
from kernelpose.models.mobilevitpose import SIZES
from kernelpose.nn.mobilevit_block import VARIANTS
from tests.models.test_mobilevitpose import TINY, image, tiny


@pytest.fixture
def released(shared: Path) -> dict[str, Any]:
    return torch.load(shared / "golden" / "mobilevit_mini_released.pt", weights_only=True)


@pytest.mark.parametrize("around", ["", "backbone."])
def test_the_released_backbone_is_rebuilt(released: dict[str, Any], around: str) -> None:
    state = {around + name: tensor for name, tensor in released["state_dict"].items()}
    assert infer_class(state) is MobileViTPose
    config = infer_config(state)
    assert {name: list(config[name]) for name in ("features_list", "d_list")} == {
        name: released["config"][name] for name in ("features_list", "d_list")
    }
    model = MobileViTPose(**config).eval()
    report = kernelpose.load_checkpoint(model, state)
    assert all(name.startswith("keypoint_head.") for name in report.missing)
    assert report.left_over == (f"{around}fc.weight", f"{around}fc.bias")
    with torch.no_grad():
        found = model.backbone(released["input"])
    torch.testing.assert_close(found, released["output"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_backbone_with_a_classifier_fills_a_backbone_and_a_model(variant: str) -> None:
    """As timm saves it, whose weights are ImageNet's."""
    model = tiny(variant=variant)
    fc = "fc" if variant == "released" else "head.fc"
    state = {**model.backbone.state_dict(), f"{fc}.weight": torch.ones(3, 32)}
    backbone = MobileViT(**TINY, variant=variant).eval()
    backbone.load_state_dict(state)
    assert torch.equal(backbone(image()), model.backbone(image()))
    for other in (MobileViT(**TINY, variant=variant), tiny(variant=variant, decoder="simple")):
        for parameter in other.parameters():
            torch.nn.init.zeros_(parameter)
        report = kernelpose.load_checkpoint(other, state)
        assert report.left_over == (f"{fc}.weight",)
        encoder = getattr(other, "backbone", other).eval()
        assert torch.equal(encoder(image()), model.backbone(image()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoder": "simple", "num_keypoints": 17},
        {"deconv_channels": (8, 8, 4)},
        {"num_keypoints": {"coco": 5, "mpii": 4}},
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_is_rebuilt(variant: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(variant=variant, **options)
    torch.save(model.state_dict(), tmp_path / "in.pth")
    report = convert_checkpoint(tmp_path / "in.pth", tmp_path / "k.safetensors", "kernelpose")
    assert (report.missing, report.left_over) == ((), ())
    rebuilt = MobileViTPose(**infer_config(tmp_path / "k.safetensors")).eval()
    report = kernelpose.load_checkpoint(rebuilt, tmp_path / "k.safetensors")
    assert (report.layout, report.missing, report.left_over) == ("kernelpose", (), ())
    dataset = "coco" if isinstance(rebuilt.num_keypoints, dict) else None
    with torch.no_grad():
        assert torch.equal(rebuilt(image(), dataset), model(image(), dataset))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_the_zoo_are_told(name: str, variant: str) -> None:
    with torch.device("meta"):
        model = kernelpose.create_model(name, variant=variant)
    state = {k: v for k, v in model.state_dict().items() if k != "input_size"}  # has no numbers
    config = infer_config(state)
    assert {argument: config[argument] for argument in SIZES[name]} == SIZES[name]
    assert config["variant"] == variant


def test_a_checkpoint_of_no_form_is_refused() -> None:
    state = tiny().state_dict()
    del state["backbone.stage3.0.conv.2.weight"]
    with pytest.raises(UserError, match=r"stage3.0.conv.2.weight is missing; expected 4 dimens"):
        infer_config(state)
