"""Checkpoints of MiTPOSE, HEViTPose, PVT v2 and HRPVT: recognised, loaded, rebuilt, converted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernelpose
from kernelpose.checkpoints import (
    convert_checkpoint,
    convert_state_dict,
    detect_layout,
    infer_class,
    infer_config,
)
from kernelpose.checkpoints.pyramid import BACKBONE
from kernelpose.errors import UserError
from kernelpose.models import HRPVT, HEViTPose, MiTPOSE, PVTv2

PYRAMID = {"embed_dims": (16, 32, 40, 64), "depths": (2, 1, 1, 1)}
CASCADE = {"embed_dims": (16, 24, 32), "depths": (1, 2, 1), "num_groups": 2, "num_heads": 4}
TRANSFORMER = {"embed_dim": 32, "depth": 2, "num_heads": 2, "image_size": (64, 48)}


def images(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def made(model: nn.Module) -> Any:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.1, 0.3)
    return model.eval()


@pytest.fixture
def mmpose(shared: Path) -> dict[str, Any]:
    return torch.load(shared / "golden" / "pvtv2_mini_mmpose.pt", weights_only=True)


@pytest.fixture
def timm(shared: Path) -> dict[str, Any]:
    return torch.load(shared / "golden" / "pvtv2_mini_timm.pt", weights_only=True)


# PVT v2 of others


def test_mmposes_maps_are_reproduced(mmpose: dict[str, Any]) -> None:
    state = mmpose["state_dict"]
    assert detect_layout(state).name == "mmpose1"
    assert infer_class(state) is PVTv2
    model = PVTv2(**infer_config(state)).eval()
    report = kernelpose.load_checkpoint(model, state)
    assert (report.missing, report.left_over) == ((), ())
    with torch.no_grad():
        found = model.maps(mmpose["input"])
    # Its patch embeddings and reductions have eps 1e-6, ours 1e-5.
    torch.testing.assert_close(found, mmpose["outputs"], rtol=1e-4, atol=1e-4)


def test_mmposes_last_digits_are_those_of_another_epsilon(mmpose: dict[str, Any]) -> None:
    """What mmpose's epsilon leaves of the difference is rounding, which differs between CPUs."""
    model = PVTv2(**infer_config(mmpose["state_dict"])).eval()
    kernelpose.load_checkpoint(model, mmpose["state_dict"])
    expected = torch.cat([maps.flatten() for maps in mmpose["outputs"]])

    def rms_error() -> float:
        with torch.no_grad():
            found = torch.cat([maps.flatten() for maps in model.maps(mmpose["input"])])
        return (found - expected).square().mean().sqrt().item()

    ours = rms_error()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    assert rms_error() < ours / 3


def test_mmposes_names_come_back_bit_for_bit(mmpose: dict[str, Any]) -> None:
    state = mmpose["state_dict"]
    ours, _ = convert_state_dict(state, "kernelpose")
    assert detect_layout(ours).name == "kernelpose"
    back, report = convert_state_dict(ours, "mmpose1")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert report.left_over == ()


def released_names(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """timm's names as the released code of PVT v2 has them."""
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^patch_embed\.", "patch_embed1.", name)
        for stage in range(4):
            name = name.replace(f"stages.{stage}.downsample.", f"patch_embed{stage + 1}.")
            name = name.replace(f"stages.{stage}.blocks.", f"block{stage + 1}.")
            name = name.replace(f"stages.{stage}.norm.", f"norm{stage + 1}.")
        renamed[prefix + name.replace(".dwconv.", ".dwconv.dwconv.")] = tensor
    return renamed


def test_released_weights_fill_a_backbone(timm: dict[str, Any]) -> None:
    state = {**released_names(timm["state_dict"]), "head.weight": torch.zeros(10, 128)}
    # Some names of the released checkpoints, written out.
    assert {
        "patch_embed1.proj.weight",
        "patch_embed4.norm.bias",
        "block1.0.attn.sr.weight",
        "block2.0.attn.norm.weight",
        "block3.0.attn.kv.bias",
        "block4.0.mlp.dwconv.dwconv.weight",
        "norm1.weight",
    } < state.keys()
    assert infer_class(state) is PVTv2
    model = PVTv2(**infer_config(state)).eval()
    report = kernelpose.load_checkpoint(model, state)
    assert (report.layout, report.missing) == ("official", ())
    assert report.left_over == ("head.weight",)  # its classifier
    with torch.no_grad():
        found = model(timm["input"])
    torch.testing.assert_close(found, timm["features"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pvtv2-b0", "pvtv2-b2"])
def test_released_names_go_both_ways(name: str) -> None:
    with torch.device("meta"):
        ours = kernelpose.create_model(name).state_dict()
    theirs = released_names(ours)
    found, report = convert_state_dict(theirs, "kernelpose")
    assert (report.missing, report.left_over) == ((), ())  # and every shape is the model's
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in ours.items()}
    back, report = convert_state_dict(found, "official")
    assert report.left_over == ()
    assert all(back[k] is v for k, v in theirs.items()) and back.keys() == theirs.keys()


@pytest.mark.parametrize(("to", "wrapped"), [("official", False), ("mmpose1", True)])
def test_a_file_is_as_its_tools_expect(to: str, wrapped: bool, tmp_path: Path) -> None:
    torch.save(PVTv2(**PYRAMID).state_dict(), tmp_path / "in.pth")
    convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", to)
    assert ("state_dict" in torch.load(tmp_path / "out.pth", weights_only=True)) == wrapped


def test_a_released_backbone_of_a_whole_model(timm: dict[str, Any]) -> None:
    """As the released code's detectors have it, under "backbone." and beside another head."""
    state = released_names(timm["state_dict"], BACKBONE)
    state["bbox_head.bias"] = torch.zeros(1)
    assert infer_class(state) is HRPVT
    model = HRPVT(**{**infer_config(state), "image_size": (128, 96)}).eval()
    report = kernelpose.load_checkpoint(model, state)
    assert report.left_over == ("bbox_head.bias",)
    assert all(name.startswith("keypoint_head.") for name in report.missing)
    with torch.no_grad():
        found = model.backbone(timm["input"])
    torch.testing.assert_close(found, timm["features"], rtol=1e-5, atol=1e-5)


def test_a_whole_model_of_mmpose(mmpose: dict[str, Any]) -> None:
    """As a heatmap head's, with the backbone's names under "backbone."."""
    head = {
        "head.deconv_layers.0.weight": torch.rand(128, 8, 4, 4),
        "head.deconv_layers.3.weight": torch.rand(8, 8, 4, 4),
        "head.deconv_layers.6.weight": torch.rand(8, 8, 4, 4),
        **{
            f"head.deconv_layers.{layer}.{leaf}": torch.rand(8) + 0.5
            for layer in (1, 4, 7)
            for leaf in ("weight", "bias", "running_mean", "running_var")
        },
        **{f"head.deconv_layers.{i}.num_batches_tracked": torch.tensor(3) for i in (1, 4, 7)},
        "head.final_layer.weight": torch.rand(5, 8, 1, 1),
        "head.final_layer.bias": torch.rand(5),
    }
    state = {**{f"backbone.{k}": v for k, v in mmpose["state_dict"].items()}, **head}
    config = infer_config(state)
    assert infer_class(state) is HRPVT
    assert (config["insertion"], config["hrpm_v1"]) == ("none", False)
    assert (config["decoder"], config["deconv_channels"]) == ("classic", (8, 8, 8))
    model = HRPVT(**{**config, "image_size": (128, 96)}).eval()
    report = kernelpose.load_checkpoint(model, {"state_dict": state})
    assert (report.missing, report.left_over) == ((), ())
    with torch.no_grad():
        features = model.backbone(mmpose["input"])
        assert model(mmpose["input"]).shape == (2, 5, 32, 24)
    torch.testing.assert_close(features, mmpose["outputs"][3], rtol=1e-4, atol=1e-4)


def test_timms_weights_fill_a_backbone(timm: dict[str, Any]) -> None:
    state = {**timm["state_dict"], "head.weight": torch.zeros(10, 128)}
    model = PVTv2(**infer_config(state)).eval()
    report = kernelpose.load_checkpoint(model, state)
    assert (report.layout, report.missing) == ("kernelpose", ())
    assert report.left_over == ("head.weight",)  # its classifier
    with torch.no_grad():
        found = model(timm["input"])
    torch.testing.assert_close(found, timm["features"], rtol=1e-5, atol=1e-5)


def test_timms_weights_fill_the_rest_of_hrpvt(timm: dict[str, Any]) -> None:
    config = infer_config(timm["state_dict"])
    model = HRPVT(**config, insertion="stage", image_size=(128, 96))
    report = kernelpose.load_checkpoint(model, timm["state_dict"])
    assert {name.split(".")[0] for name in report.left_over} == {"patch_embed"}
    parts = ("backbone.stem.", "keypoint_head.")
    assert all(name.startswith(parts) or ".hrpm." in name for name in report.missing)
    weight = "stages.2.blocks.0.mlp.fc1.weight"
    assert torch.equal(model.backbone.get_parameter(weight), timm["state_dict"][weight])


def test_a_whole_model_fills_a_backbone_alone() -> None:
    model = made(HRPVT(**PYRAMID, insertion="none", hrpm_v1=False, image_size=(64, 48)))
    backbone = PVTv2(**PYRAMID).eval()
    report = kernelpose.load_checkpoint(backbone, model.state_dict())
    assert report.missing == ()
    assert all(name.startswith("keypoint_head.") for name in report.left_over)
    assert torch.equal(backbone(images((64, 48))), model.backbone(images((64, 48))))


# Our own, saved


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"insertion": "stage", "image_size": (96, 64)},
        {"insertion": "vanilla", "hrpm_v1": False, "split_ratio": 3.0},
        {"insertion": "none", "decoder": "classic", "deconv_channels": (8, 8, 4)},
        {"decoder": "simple", "image_size": (101, 75), "num_keypoints": 5},
        {"num_keypoints": {"coco": 17, "mpii": 16}},
    ],
)
def test_a_saved_hrpvt_is_rebuilt(options: dict[str, Any], tmp_path: Path) -> None:
    size = options.get("image_size", (64, 48))
    model = made(HRPVT(**PYRAMID, **{**options, "image_size": size}))
    torch.save(model.state_dict(), tmp_path / "k.pth")
    assert infer_class(tmp_path / "k.pth") is HRPVT
    rebuilt = HRPVT(**infer_config(tmp_path / "k.pth")).eval()
    report = kernelpose.load_checkpoint(rebuilt, tmp_path / "k.pth")
    assert (report.layout, report.missing, report.left_over) == ("kernelpose", (), ())
    assert rebuilt.image_size == size
    dataset = "coco" if isinstance(rebuilt.num_keypoints, dict) else None
    with torch.no_grad():
        found, expected = (m(images(size), dataset) for m in (rebuilt, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_size": (48, 80), "sr_ratios": (4, 2, 1), "ffn_ratio": 1.5},
        {"decoder": "simple", "num_keypoints": 5},
        {"deconv_channels": (16, 8), "num_keypoints": {"coco": 17, "mpii": 16}},
    ],
)
def test_a_saved_hevitpose_is_rebuilt(options: dict[str, Any], tmp_path: Path) -> None:
    size = options.get("image_size", (64, 32))
    model = made(HEViTPose(**CASCADE, **{**options, "image_size": size}))
    torch.save(model.state_dict(), tmp_path / "k.pth")
    assert infer_class(tmp_path / "k.pth") is HEViTPose
    with pytest.raises(
        UserError, match=r"num_heads is None; expected a number for embed_dims \(16"
    ):
        infer_config(tmp_path / "k.pth")
    rebuilt = HEViTPose(**infer_config(tmp_path / "k.pth", num_heads=4)).eval()
    report = kernelpose.load_checkpoint(rebuilt, tmp_path / "k.pth")
    assert (report.layout, report.missing, report.left_over) == ("kernelpose", (), ())
    assert rebuilt.image_size == size
    dataset = "coco" if isinstance(rebuilt.num_keypoints, dict) else None
    with torch.no_grad():
        found, expected = (m(images(size), dataset) for m in (rebuilt, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_zoos_hevitposes_know_their_heads() -> None:
    for name in ("hevitpose-t", "hevitpose-s", "hevitpose-b"):
        model = kernelpose.create_model(name, image_size=(256, 256), num_keypoints=16)
        config = infer_config(model.state_dict())
        assert config["num_heads"] == 2
        assert (config["image_size"], config["num_keypoints"]) == ((256, 256), 16)
        assert HEViTPose(**config).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("layout", ["figure", "released"])
@pytest.mark.parametrize("decoder", ["simple", "classic"])
def test_a_saved_mitpose_is_rebuilt(layout: str, decoder: str, tmp_path: Path) -> None:
    model = made(MiTPOSE(**TRANSFORMER, layout=layout, decoder=decoder))
    torch.save(model.state_dict(), tmp_path / "k.pth")
    assert infer_class(tmp_path / "k.pth") is MiTPOSE
    with pytest.raises(UserError, match="num_heads is None; expected a number for a width of 32"):
        infer_config(tmp_path / "k.pth")
    rebuilt = MiTPOSE(**infer_config(tmp_path / "k.pth", num_heads=2)).eval()
    report = kernelpose.load_checkpoint(rebuilt, tmp_path / "k.pth")
    assert (report.missing, report.left_over) == ((), ())
    with torch.no_grad():
        assert torch.equal(rebuilt(images((64, 48))), model(images((64, 48))))


def test_released_sizes_of_mitpose_know_their_heads() -> None:
    for name, heads in (("mitpose-l", 16), ("mitpose-b-released", 12)):
        with torch.device("meta"):
            model = kernelpose.create_model(name)
        config = infer_config(model.state_dict(), grid=(16, 12))
        assert config["num_heads"] == heads
        assert config["layout"] == ("released" if "released" in name else "figure")


def test_a_released_table_is_resized() -> None:
    model = made(MiTPOSE(**TRANSFORMER, layout="released"))
    larger = MiTPOSE(**{**TRANSFORMER, "image_size": (128, 96)}, layout="released")
    report = kernelpose.load_checkpoint(larger, model.state_dict())
    assert report.notes == ("position table resized from 4x3 to 8x6",)
    assert larger.backbone.pos_embed.std() > 0


# Converting


def test_a_released_mitpose_is_converted_both_ways() -> None:
    model = made(MiTPOSE(**TRANSFORMER, layout="released"))
    theirs, report = convert_state_dict(model.state_dict(), "mmpose1")
    assert report.left_over == ()
    assert {name.split(".")[0] for name in theirs} == {"backbone", "head"}
    assert detect_layout(theirs).name == "mmpose1"
    back, _ = convert_state_dict(theirs, "kernelpose")
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_every_family(suffix: str, tmp_path: Path) -> None:
    for model in (
        MiTPOSE(**TRANSFORMER),
        HEViTPose(**{**CASCADE, "num_heads": 2}, image_size=(64, 32)),
        HRPVT(**PYRAMID, image_size=(64, 48)),
        PVTv2(**PYRAMID),
    ):
        torch.save(made(model).state_dict(), tmp_path / "in.pth")
        report = convert_checkpoint(tmp_path / "in.pth", tmp_path / f"out{suffix}", "kernelpose")
        assert (report.missing, report.left_over) == ((), ())
        other = type(model)(**infer_config(tmp_path / f"out{suffix}", num_heads=2))
        kernelpose.load_checkpoint(other, tmp_path / f"out{suffix}")
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name


def test_what_mmpose_has_no_place_for_is_reported() -> None:
    model = HRPVT(**PYRAMID, insertion="vanilla", image_size=(64, 48))
    _, report = convert_state_dict(model.state_dict(), "mmpose1")
    assert all(".stem." in name or ".hrpm." in name for name in report.left_over)
    assert len(report.left_over) > 50


# What does not fit


@pytest.mark.parametrize("to", ["official", "transformers"])
def test_a_layout_that_a_family_lacks_is_refused(to: str) -> None:
    state = HEViTPose(**{**CASCADE, "num_heads": 2}, image_size=(64, 32)).state_dict()
    message = f"to is '{to}'; expected one of kernelpose for a checkpoint of HEViTPose"
    with pytest.raises(UserError, match=message):
        convert_state_dict(state, to)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"input_size": torch.tensor([64, 8])},
            r"input_size is \[64, 8\]; expected a height and a width of at least 32",
        ),
        (
            {"backbone.stages.1.blocks.0.hrpm.up.weight": torch.zeros(32, 16, 4, 4)},
            "checkpoint has HRPM v2 after 3 blocks; expected those of an insertion of none, vanil",
        ),
        (
            {"backbone.stages.3.blocks.0.attn.q.weight": None},
            r"stages.3.blocks.0.attn.q.weight is missing; expected 2 dimensions",
        ),
        (
            {"backbone.stages.0.blocks.5.norm1.weight": torch.zeros(16)},
            "checkpoint numbers its 3 blocks up to 5; expected 0, 1, 2",
        ),
    ],
)
def test_a_checkpoint_of_no_form_is_refused(change: dict[str, Any], message: str) -> None:
    state = {**HRPVT(**PYRAMID, image_size=(64, 48)).state_dict(), **change}
    with pytest.raises(UserError, match=message):
        infer_config({name: tensor for name, tensor in state.items() if tensor is not None})


def test_a_projection_of_no_three_parts_is_refused(mmpose: dict[str, Any]) -> None:
    name = "layers.0.1.0.attn.attn.in_proj_weight"
    with pytest.raises(UserError, match=r"in_proj_weight has shape \(47, 16\); expected queries"):
        infer_config({**mmpose["state_dict"], name: torch.zeros(47, 16)})


def test_another_shape_is_refused_and_leaves_the_model_alone() -> None:
    model = made(HRPVT(**PYRAMID, image_size=(64, 48)))
    other = HRPVT(**PYRAMID, image_size=(96, 64))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UserError, match=r"keypoint_head.mlp_head_x.weight has shape \(96, 4\)"):
        kernelpose.load_checkpoint(other, model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    report = kernelpose.load_checkpoint(other, model.state_dict(), head=False)
    assert other.state_dict()["input_size"].tolist() == [96, 64]
    assert report.missing == ()
