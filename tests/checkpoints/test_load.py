"""load_checkpoint and infer_config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kernelpose
from kernelpose import UserError, load_checkpoint
from kernelpose.checkpoints import infer_config
from kernelpose.checkpoints.files import write_state_dict
from kernelpose.models import ViTPose
from kernelpose.models.position import resize_position_table

StateDict = dict[str, torch.Tensor]
Make = dict[str, Callable[..., StateDict]]


def mini(**options: Any) -> ViTPose:
    torch.manual_seed(1)
    defaults: dict[str, Any] = {
        "embed_dim": 12,
        "depth": 2,
        "num_heads": 3,
        "mlp_ratio": 20 / 12,
        "num_keypoints": 5,
        "image_size": (64, 48),
        "deconv_channels": (6, 6),
    }
    if options.get("decoder") == "simple":
        del defaults["deconv_channels"]
    return ViTPose(**{**defaults, **options}).eval()


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("decoder", ["classic", "simple"])
def test_every_layout_fills_the_model(make: Make, layout: str, decoder: str, wrapped: bool) -> None:
    state = make[layout](decoder)
    model = mini(decoder=decoder)
    report = load_checkpoint(model, {"state_dict": state, "meta": {}} if wrapped else state)
    assert report.layout == layout
    recorded = set() if layout == "kernelpose" else {"backbone.pos_grid"}
    assert set(report.matched) == set(model.state_dict()) - recorded
    assert report.missing == report.left_over == ()
    final = next(
        t for name, t in state.items() if t.shape == model.keypoint_head.final_layer.weight.shape
    )
    assert torch.equal(model.keypoint_head.final_layer.weight, final)


def test_the_report_prints_what_a_person_wants_to_know(make: Make) -> None:
    state = make["official"]()
    state["stranger"] = torch.zeros(1)
    del state["backbone.last_norm.bias"]
    text = str(load_checkpoint(mini(image_size=(96, 96)), state))
    assert text.splitlines() == [
        f"official layout: {len(state) - 1} tensors matched",
        "  missing (1): backbone.last_norm.bias",
        "  left over (1): stranger",
        "  note: position table resized from 4x3 to 6x6",
    ]


def test_the_table_is_resized_from_its_true_grid(make: Make) -> None:
    state = make["official"]()
    table = state["backbone.pos_embed"]
    model = mini(image_size=(96, 64))
    load_checkpoint(model, state)
    assert torch.equal(model.backbone.pos_embed, resize_position_table(table, (4, 3), (6, 4)))
    assert model.backbone.pos_grid.tolist() == [6, 4]
    load_checkpoint(model, state, grid=(2, 6))
    assert torch.equal(model.backbone.pos_embed, resize_position_table(table, (2, 6), (6, 4)))
    # Ours records it, so nothing is guessed: the same number of tokens the other way round.
    wide = mini(image_size=(48, 64))
    report = load_checkpoint(wide, make["kernelpose"]())
    assert torch.equal(wide.backbone.pos_embed, resize_position_table(table, (4, 3), (3, 4)))
    assert report.notes == ("position table resized from 4x3 to 3x4",)


def test_a_landscape_model_asks_which_way_the_table_lies(make: Make) -> None:
    wide = mini(image_size=(48, 64))
    with pytest.raises(UserError, match="12 tokens, which may be 4x3 or the model's 3x4"):
        load_checkpoint(wide, make["official"]())
    load_checkpoint(wide, make["official"](), grid=(3, 4))
    assert torch.equal(wide.backbone.pos_embed, make["official"]()["backbone.pos_embed"])


def test_a_table_that_suggests_no_grid_is_taken_to_have_the_models(make: Make) -> None:
    state = make["official"]()
    state["backbone.pos_embed"] = torch.ones(1, 11, 12)
    model = mini(image_size=(80, 32))
    assert not load_checkpoint(model, state).notes
    assert torch.equal(model.backbone.pos_embed, state["backbone.pos_embed"])


def test_other_keypoints_are_refused_and_leave_the_model_alone(make: Make) -> None:
    model = mini(num_keypoints=9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"\(5, 6, 1, 1\); expected .*\(9, 6, 1, 1\).*head=False"):
        load_checkpoint(model, make["official"]())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    report = load_checkpoint(model, make["official"](), head=False)
    grid = "backbone.pos_grid"
    assert {*report.matched, grid} == {name for name in before if name.startswith("backbone.")}
    assert report.missing == report.left_over == ()
    after = model.state_dict()
    for name, tensor in before.items():
        same = torch.equal(after[name], tensor)
        assert same is (name.startswith("keypoint_head.") or name.endswith("pos_grid")), name


def test_a_checkpoint_of_another_model_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"holds conv\.weight; expected a model of MiTPOSE"):
        load_checkpoint(mini(), {"conv.weight": torch.zeros(3)})
    with pytest.raises(UserError, match="holds 43 tensors; expected some that the model has"):
        load_checkpoint(torch.nn.Linear(2, 2), make["official"]())


def test_any_model_takes_its_own_state_dict() -> None:
    source, target = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    report = load_checkpoint(target, source.state_dict())
    assert report.layout == "kernelpose"
    assert torch.equal(source.weight, target.weight)


def test_the_model_keeps_its_dtype(make: Make) -> None:
    model = mini().half()
    load_checkpoint(model, make["official"]())
    expected = make["official"]()["backbone.pos_embed"].half()
    assert torch.equal(model.backbone.pos_embed, expected)


# Several data sets


def test_one_of_several_decoders_is_taken(make: Make) -> None:
    state = make["official"]("classic", (17, 14, 16))
    model = mini(num_keypoints=14)
    report = load_checkpoint(model, state, dataset="aic")
    final = state["associate_keypoint_heads.0.final_layer.weight"]
    assert torch.equal(model.keypoint_head.final_layer.weight, final)
    assert report.notes == ("decoder taken of coco, aic, mpii: aic",)


def test_several_decoders_fill_several(make: Make) -> None:
    state = make["official"]("classic", (17, 14, 16))
    model = mini(num_keypoints={"coco": 17, "mpii": 16})
    report = load_checkpoint(model, state)
    final = state["associate_keypoint_heads.1.final_layer.weight"]
    assert torch.equal(model.keypoint_heads["mpii"].final_layer.weight, final)
    assert report.missing == ()
    assert report.left_over and all("keypoint_heads.aic." in name for name in report.left_over)


def test_one_decoder_fills_one_of_several(make: Make) -> None:
    model = mini(num_keypoints={"cat": 5, "dog": 7})
    report = load_checkpoint(model, make["official"](), dataset="cat")
    final = make["official"]()["keypoint_head.final_layer.weight"]
    assert torch.equal(model.keypoint_heads["cat"].final_layer.weight, final)
    assert all(name.startswith("keypoint_heads.dog.") for name in report.missing)


def test_an_expert_is_merged_on_loading(make: Make) -> None:
    state = make["official"]("classic", (17, 14, 16, 17, 17, 133), 3)
    model = mini(num_keypoints=16)
    load_checkpoint(model, state, dataset="mpii")
    block = "backbone.blocks.1.mlp"
    expected = torch.cat([state[f"{block}.fc2.weight"], state[f"{block}.experts.2.weight"]])
    assert torch.equal(model.backbone.blocks[1].mlp.fc2.weight, expected)


# infer_config


@pytest.mark.parametrize("decoder", ["classic", "simple"])
def test_a_model_is_built_from_the_shapes(make: Make, layout: str, decoder: str) -> None:
    config = infer_config(make[layout](decoder), num_heads=3)
    assert config == {
        "embed_dim": 12,
        "depth": 2,
        "num_heads": 3,
        "mlp_ratio": 20 / 12,
        "num_keypoints": 5,
        "image_size": (64, 48),
        "patch_stride": 16,
        "decoder": decoder,
        "deconv_channels": (6, 6) if decoder == "classic" else None,
        "drop_path": 0.0,
        "layer_norm_eps": 1e-12 if layout == "transformers" else 1e-6,
    }
    assert not load_checkpoint(ViTPose(**config), make[layout](decoder)).missing


@pytest.mark.parametrize("patch_stride", [16, 8])
def test_a_saved_model_is_rebuilt(patch_stride: int) -> None:
    model = mini(
        patch_stride=patch_stride,
        num_keypoints={"cat": 5, "dog": 7},
        deconv_channels=(6, 7)[: patch_stride // 8],
        image_size=(64, 80),
    )
    rebuilt = ViTPose(**infer_config(model.state_dict(), num_heads=3)).eval()
    load_checkpoint(rebuilt, model.state_dict())
    x = torch.randn(1, 3, 64, 80)
    assert rebuilt.image_size == (64, 80)
    assert torch.equal(rebuilt(x, dataset="dog"), model(x, dataset="dog"))


FORMS: list[dict[str, Any]] = [
    {"attention": "window", "window": (2, 3)},
    {"attention": "window+shift", "window": (2, 2)},
    {"attention": "window+pool", "window": (3, 2), "num_full_layers": 1},
    {"attention": "window+shift+pool", "patch_stride": 8, "decoder": "simple"},
]


@pytest.mark.parametrize("form", FORMS, ids=[form["attention"] for form in FORMS])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_saved_form_is_rebuilt(form: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    model = mini(**form, depth=4)
    write_state_dict(tmp_path / f"k{suffix}", model.state_dict(), wrap=False)
    config = infer_config(tmp_path / f"k{suffix}", num_heads=3)
    rebuilt = ViTPose(**config).eval()
    report = load_checkpoint(rebuilt, tmp_path / f"k{suffix}")
    assert report.missing == report.left_over == report.notes == ()
    x = torch.randn(2, 3, 64, 48)
    assert torch.equal(rebuilt(x), model(x))
    assert not torch.equal(mini(**{**form, "attention": "full", "window": None,
                                   "num_full_layers": 0}, depth=4)(x), model(x))  # fmt: skip


def test_a_model_keeps_its_own_form_and_the_report_says_so() -> None:
    full, shifted = mini(depth=4), mini(depth=4, **FORMS[1])
    for model, source, note in (
        (
            full,
            shifted,
            "trained with attention='window+shift', window=(2, 2), num_full_layers=0, "
            "the model has attention='full'",
        ),
        (
            shifted,
            full,
            "trained with attention='full', the model has attention='window+shift', "
            "window=(2, 2), num_full_layers=0",
        ),
    ):
        before = {name: t.clone() for name, t in model.state_dict().items() if "windows" in name}
        report = load_checkpoint(model, source.state_dict())
        assert report.notes == (note,)
        assert report.missing == report.left_over == ()
        # Also as PyTorch loads it, strictly.
        model.load_state_dict(source.state_dict())
        after = {name: t for name, t in model.state_dict().items() if "windows" in name}
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_released_sizes_know_their_heads() -> None:
    with torch.device("meta"):
        model = kernelpose.create_model("vitpose-s")
    state = {name: torch.empty_like(tensor) for name, tensor in model.state_dict().items()}
    state["backbone.pos_grid"] = torch.tensor([16, 12])
    config = infer_config(state)
    assert (config["num_heads"], config["drop_path"]) == (12, 0.10)


def test_what_no_shape_tells_is_asked_for(make: Make) -> None:
    with pytest.raises(UserError, match="num_heads is None; expected a number for a width of 12"):
        infer_config(make["official"]())
    state = make["official"]("simple")
    assert infer_config(state, num_heads=3, patch_stride=8)["image_size"] == (32, 24)
