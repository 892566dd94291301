"""The zoo: what is listed, names, near matches, registration."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import kernelpose
from kernelpose.checkpoints.families import FAMILIES
from kernelpose.cli import main
from kernelpose.models import ModelInfo, ViTPose, create_model, list_models
from kernelpose.models.counting import count
from kernelpose.models.pose_model import PoseModel
from kernelpose.models.zoo import register

MODELS = {model.name: model for model in list_models()}


def test_the_package_offers_the_zoo() -> None:
    assert kernelpose.create_model is create_model
    assert kernelpose.list_models() == list_models()


def test_all_five_systems_are_listed_from_small_to_large() -> None:
    assert list(MODELS) == [
        *("vitpose-s", "vitpose-b", "vitpose-l", "vitpose-h"),
        *("mitpose-b", "mitpose-l", "mitpose-h"),
        *("mitpose-b-released", "mitpose-l-released", "mitpose-h-released"),
        *("hevitpose-t", "hevitpose-s", "hevitpose-b"),
        *("mobilevitpose-xxs", "mobilevitpose-s"),
        *("hrpvt-s", "hrpvt-m", "hrpvt-l"),
    ]
    named = {n for f in FAMILIES if issubclass(f.model, PoseModel) for n in f.sizes}
    assert named == set(MODELS)  # what a checkpoint may be of


def test_a_list_is_the_callers_own() -> None:
    list_models().clear()
    assert list_models()
    with pytest.raises(dataclasses.FrozenInstanceError):
        list_models()[0].gmacs = 0  # type: ignore[misc]
    assert len({*list_models(), *list_models()}) == len(MODELS)


def test_listing_is_quick() -> None:
    """It builds and counts nothing."""
    script = (
        "import time, kernelpose; kernelpose.list_models; start = time.perf_counter()\n"
        "kernelpose.list_models(); print(time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert float(done.stdout) < 0.01, done.stderr


@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_what_is_built(name: str) -> None:
    info = MODELS[name]
    for decoder in info.decoders:
        with torch.device("meta"):
            model = create_model(name, decoder=decoder)
        assert isinstance(model, PoseModel)
        assert model.image_size == info.image_size
        if decoder == info.decoders[0]:
            with torch.device("meta"):
                default = create_model(name)
            assert default.state_dict().keys() == model.state_dict().keys()
            counted = count(model, info.image_size)
            assert counted.parameters == info.parameters
            assert round(getattr(counted, info.convention) / 1e9, 3) == info.gmacs
    with pytest.raises(ValueError, match="decoder is 'none'; expected"), torch.device("meta"):
        create_model(name, decoder="none")


def test_what_is_published_has_a_source_and_nothing_else_has() -> None:
    for info in MODELS.values():
        assert (info.accuracy is None) == (info.source is None)
        assert info.standing and info.weights == "none shipped"
    assert MODELS["vitpose-b"].accuracy == {
        "COCO val AP": 75.8,
        "COCO val AP, simple decoder": 75.5,
    }
    assert MODELS["hevitpose-b"].accuracy["MPII test"] == 90.7
    assert all(MODELS[f"hrpvt-{letter}"].accuracy is None for letter in "sml")
    assert all("reconstruction" in MODELS[f"hevitpose-{letter}"].standing for letter in "tsb")


def test_the_command_prints_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    for info in MODELS.values():
        row = next(line for line in lines if line.startswith(f"{info.name} "))
        assert f"{info.parameters / 1e6:.1f}" in row.split()
        assert f"{info.gmacs:.1f}" in row.split()
        words = " ".join(text.split())
        assert info.standing in words
        assert info.source is None or info.source in words
    assert "`all`" in text
    assert "Weights: none shipped." in text


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [ModelInfo(**{**row, **_tuples(row)}) for row in rows] == list_models()


def _tuples(row: dict[str, object]) -> dict[str, tuple[object, ...]]:
    return {key: tuple(value) for key, value in row.items() if isinstance(value, list)}


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
    with pytest.raises(kernelpose.UserError, match=r"name is 5; expected that of one of list_mode"):
        create_model(5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_keypoints", 17), ("image_size", (256, 192)), ("decoder", "classic")],
)
def test_a_backbone_alone_refuses_what_it_does_not_have(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{option} is .*; expected None for pvtv2-b0, a backbo"):
        create_model("pvtv2-b0", **{option: value})


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
