"""Layouts: recognition, round trips, the quirks of position tables, qkv and experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernelpose import UserError
from kernelpose.checkpoints import LAYOUTS, convert_state_dict, detect_layout

StateDict = dict[str, torch.Tensor]
Make = dict[str, Callable[..., StateDict]]


def same(a: StateDict, b: StateDict) -> bool:
    """Bit for bit, signs of zeros included."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].numpy().tobytes() == b[name].numpy().tobytes()
        for name in a
    )


def test_each_layout_is_recognised(make: Make, layout: str) -> None:
    assert detect_layout(make[layout]()).name == layout


def test_another_model_is_not() -> None:
    with pytest.raises(UserError, match=r"holds conv1\.weight; expected a model of MiTPOSE"):
        detect_layout({"conv1.weight": torch.zeros(1)})


@pytest.mark.parametrize("decoder", ["classic", "simple"])
def test_into_ours_and_back_is_bit_for_bit(make: Make, layout: str, decoder: str) -> None:
    state = make[layout](decoder)
    ours, report = convert_state_dict(state, "kernelpose")
    assert (report.layout, report.missing, report.left_over) == (layout, (), ())
    assert ours.keys() == make["kernelpose"](decoder).keys()
    back, _ = convert_state_dict(ours, layout)
    assert same(back, state)


@pytest.mark.parametrize("to", ["official", "transformers"])
def test_out_of_ours_and_back_is_bit_for_bit(make: Make, to: str) -> None:
    ours = make["kernelpose"]()
    back, _ = convert_state_dict(convert_state_dict(ours, to)[0], "kernelpose")
    assert same(back, ours)


def test_names_of_every_layout(make: Make, layout: str) -> None:
    for to in LAYOUTS:
        converted, report = convert_state_dict(make[layout](), to)
        assert converted.keys() == make[to]().keys()
        assert not report.left_over


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_stays(make: Make, dtype: torch.dtype) -> None:
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in make["transformers"]().items()
    }
    ours, _ = convert_state_dict(state, "kernelpose")
    back, _ = convert_state_dict(ours, "transformers")
    assert all(back[name].dtype == tensor.dtype for name, tensor in state.items())
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


# Position tables


def test_row_0_is_added_in_for_mmpose1_and_zeros_are_prepended_on_the_way_back(make: Make) -> None:
    state = make["official"]()
    table = state["backbone.pos_embed"]
    converted, report = convert_state_dict(state, "mmpose1")
    assert torch.equal(converted["backbone.pos_embed"], table[:, 1:] + table[:, :1])
    assert "row 0 of the position table added into the others" in report.notes
    back, _ = convert_state_dict(converted, "official")
    assert torch.equal(back["backbone.pos_embed"][:, :1], torch.zeros(1, 1, 12))
    assert torch.equal(back["backbone.pos_embed"][:, 1:], converted["backbone.pos_embed"])


def test_a_row_0_of_zeros_costs_no_bit(make: Make) -> None:
    state = make["mmpose1"]()
    state["backbone.pos_embed"][0, 0, 0] = -0.0
    ours, _ = convert_state_dict(state, "kernelpose")
    back, report = convert_state_dict(ours, "mmpose1")
    assert same(back, state)
    assert not report.notes


def test_the_grid_is_guessed_recorded_or_asked_for(make: Make) -> None:
    grid = "backbone.pos_grid"
    state = make["official"]()
    assert convert_state_dict(state, "kernelpose")[0][grid].tolist() == [4, 3]
    assert convert_state_dict(state, "kernelpose", grid=(3, 4))[0][grid].tolist() == [3, 4]
    ours = {**state, grid: torch.tensor([2, 6])}
    assert convert_state_dict(ours, "kernelpose")[0][grid].tolist() == [2, 6]
    state["backbone.pos_embed"] = torch.zeros(1, 11, 12)
    with pytest.raises(UserError, match=r"grid is None; .* table of 10 tokens"):
        convert_state_dict(state, "kernelpose")
    assert convert_state_dict(state, "kernelpose", grid=(5, 2))[0][grid].tolist() == [5, 2]
    with pytest.raises(UserError, match="has 10 tokens; expected 12 for the grid 3x4"):
        convert_state_dict(state, "kernelpose", grid=(3, 4))
    convert_state_dict(state, "official")


# qkv


def test_thirds_of_the_rows_are_query_key_and_value(make: Make) -> None:
    state = make["official"]()
    converted, _ = convert_state_dict(state, "transformers")
    packed = state["backbone.blocks.1.attn.qkv.weight"]
    for number, third in enumerate(("query", "key", "value")):
        part = converted[f"backbone.encoder.layer.1.attention.attention.{third}.weight"]
        assert torch.equal(part, packed[12 * number : 12 * (number + 1)])
        # Saved alone, not with the storage of all three.
        assert part.untyped_storage().nbytes() == part.nbytes


# ViTPose+ and several data sets

HEADS = (17, 14, 16, 17, 17, 133)
DATASETS = ("coco", "aic", "mpii", "ap10k", "apt36k", "wholebody")


@pytest.mark.parametrize("part", [3, 4])
@pytest.mark.parametrize("number", [0, 2, 5])
def test_the_merged_layer_is_the_mixture_run_for_one_data_set(
    make: Make, number: int, part: int
) -> None:
    state = make["official"]("simple", HEADS, part)
    ours, report = convert_state_dict(state, "kernelpose", dataset=DATASETS[number])
    hidden = torch.randn(4, 20)
    for block in ("backbone.blocks.0.mlp", "backbone.blocks.1.mlp"):
        outputs = [
            torch.nn.functional.linear(hidden, state[f"{name}.weight"], state[f"{name}.bias"])
            for name in (f"{block}.fc2", *(f"{block}.experts.{j}" for j in range(6)))
        ]
        mask = torch.nn.functional.one_hot(torch.tensor(number), 6)
        chosen = sum(output * weight for output, weight in zip(outputs[1:], mask, strict=True))
        mixture = torch.cat([outputs[0], chosen], dim=-1)
        merged = torch.nn.functional.linear(
            hidden, ours[f"{block}.fc2.weight"], ours[f"{block}.fc2.bias"]
        )
        torch.testing.assert_close(merged, mixture)
    head = f"associate_keypoint_heads.{number - 1}" if number else "keypoint_head"
    assert torch.equal(
        ours["keypoint_head.final_layer.weight"], state[f"{head}.final_layer.weight"]
    )
    assert ours.keys() == make["kernelpose"]("simple").keys()
    assert f"6 experts: that of {DATASETS[number]} merged into fc2" in report.notes[0]


def test_coco_is_the_default_and_an_unknown_data_set_is_named(make: Make) -> None:
    state = make["official"]("simple", HEADS, 3)
    default, _ = convert_state_dict(state, "official")
    coco, _ = convert_state_dict(state, "official", dataset="coco")
    assert same(default, coco)
    with pytest.raises(UserError, match="dataset is 'dogs'; expected one of coco, aic"):
        convert_state_dict(state, "official", dataset="dogs")


def test_experts_of_transformers_are_merged_too(make: Make) -> None:
    state = make["transformers"]("simple", 4)
    ours, report = convert_state_dict(state, "kernelpose", dataset="mpii")
    layer = "backbone.encoder.layer.0.mlp"
    expected = torch.cat([state[f"{layer}.fc2.bias"], state[f"{layer}.experts.2.bias"]])
    assert torch.equal(ours["backbone.blocks.0.mlp.fc2.bias"], expected)
    assert "the one decoder was kept, which need not be that of mpii" in report.notes


def test_a_data_set_that_nothing_tells_apart_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match="dataset is 'nope'; expected None"):
        convert_state_dict(make["official"](), "kernelpose", dataset="nope")


def test_a_grid_of_no_numbers_is_refused(make: Make) -> None:
    state = {**make["kernelpose"](), "backbone.pos_grid": torch.tensor([float("nan"), 3])}
    with pytest.raises(UserError, match=r"pos_grid is \[nan, 3.0\]; expected rows"):
        convert_state_dict(state, "kernelpose")


def test_several_decoders_without_experts_stay_together(make: Make) -> None:
    state = make["official"]("classic", (17, 14, 16))
    ours, report = convert_state_dict(state, "kernelpose")
    assert not report.left_over
    names = {name.split(".")[1] for name in ours if name.startswith("keypoint_heads.")}
    assert names == {"coco", "aic", "mpii"}
    back, _ = convert_state_dict(ours, "official")
    assert same(back, state)
    single, _ = convert_state_dict(ours, "mmpose1", dataset="aic")
    assert single["head.final_layer.weight"].shape[0] == 14
    assert single.keys() == make["mmpose1"]().keys()


def test_decoders_that_the_official_layout_cannot_name_ask_for_one(make: Make) -> None:
    state = make["kernelpose"]("simple")
    for leaf in ("weight", "bias"):
        head = state.pop(f"keypoint_head.final_layer.{leaf}")
        state |= {f"keypoint_heads.{name}.final_layer.{leaf}": head for name in ("cat", "dog")}
    with pytest.raises(
        UserError, match="dataset is None for decoders of cat, dog; expected one of them"
    ):
        convert_state_dict(state, "official")
    converted, _ = convert_state_dict(state, "official", dataset="dog")
    assert converted.keys() == make["official"]("simple").keys()


# Forms of attention


def windowed(make: Make) -> StateDict:
    """Two layers: within pooled windows of 2x3, then over the whole map."""
    table = torch.tensor([[2, 3, 0, 0, 1], [0, 0, 0, 0, 0]])
    return {**make["kernelpose"](), "backbone.windows": table}


def test_windows_stay_in_our_layout_and_are_missed_in_others(make: Make, layout: str) -> None:
    state = windowed(make)
    converted, report = convert_state_dict(state, layout)
    assert not report.left_over
    if layout == "kernelpose":
        assert same(converted, state)
        assert not report.notes
    else:
        assert converted.keys() == make[layout]().keys()
        note = f"the {layout} layout does not record that its attention is windowed"
        assert note in report.notes


@pytest.mark.parametrize(
    "table",
    [
        torch.tensor([[2, 3, 0, 0, 1]] * 3),  # of three layers
        torch.tensor([[2, 3, 0, 0, 1], [4, 4, 0, 0, 1]]),  # of two sizes
        torch.tensor([[2, 3, 2, 0, 1], [0, 0, 0, 0, 0]]),  # of another shift
        torch.tensor([[0, 0, 0, 0, 0], [2, 3, 0, 0, 0]]),  # full where it is not
        torch.tensor([[-2, 3, 0, 0, 0], [-2, 3, 0, 0, 0]]),
        torch.tensor([[2, 3, 0, 0, float("nan")]] * 2),
        torch.tensor(7),
    ],
)
def test_windows_of_no_form_are_refused(make: Make, table: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"backbone\.windows is .* of each of the 2 layers"):
        convert_state_dict({**make["kernelpose"](), "backbone.windows": table}, "kernelpose")


def test_a_stride_of_nothing_is_refused(make: Make) -> None:
    state = {**make["kernelpose"]("simple"), "backbone.patch_stride": torch.tensor(4)}
    with pytest.raises(UserError, match=r"backbone\.patch_stride is 4; expected 16 or 8"):
        convert_state_dict(state, "kernelpose")


# What is left over, missing or wrong


def test_a_class_token_is_dropped_and_strangers_are_reported(make: Make) -> None:
    state = make["official"]()
    state |= {"backbone.cls_token": torch.zeros(1, 1, 12), "ema.decay": torch.zeros(1)}
    converted, report = convert_state_dict(state, "kernelpose")
    assert converted.keys() == make["kernelpose"]().keys()
    assert report.left_over == ("ema.decay",)
    assert any("cls_token dropped" in note for note in report.notes)


def test_an_encoder_alone_is_converted_and_its_decoder_reported_missing(make: Make) -> None:
    state = {name: t for name, t in make["mmpose1"]().items() if not name.startswith("head.")}
    converted, report = convert_state_dict(state, "official")
    assert len(converted) == len(state)
    assert report.missing and all(name.startswith("keypoint_head.") for name in report.missing)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "backbone.blocks.1.attn.qkv.weight",
            (35, 12),
            r"has shape \(35, 12\); expected \(36, 12\)",
        ),
        ("keypoint_head.final_layer.bias", (4,), r"has shape \(4,\); expected \(5,\)"),
        ("backbone.pos_embed", (13, 12), r"pos_embed has shape \(13, 12\); expected 3 dim"),
        ("backbone.pos_embed", (1, 1, 12), "grid"),
        ("backbone.blocks.0.mlp.fc1.weight", (0, 12), "none empty"),
        ("backbone.blocks.7.norm1.weight", (12,), "numbers its 3 blocks up to 7; expected 0, 1"),
    ],
)
def test_a_wrong_shape_is_named(
    make: Make, name: str, shape: tuple[int, ...], message: str
) -> None:
    state = make["official"]()
    state[name] = torch.zeros(shape)
    with pytest.raises(UserError, match=message):
        convert_state_dict(state, "transformers")


def test_thirds_that_do_not_match_are_named(make: Make) -> None:
    state = make["transformers"]()
    name = "backbone.encoder.layer.0.attention.attention.key.weight"
    state[name] = state[name][:-1]
    with pytest.raises(
        UserError, match=r"attn\.key\.weight has shape \(11, 12\); expected \(12, 12\)"
    ):
        convert_state_dict(state, "official")


def test_transformers_has_two_deconvolutions(make: Make) -> None:
    state = make["official"]()
    state = {name: t for name, t in state.items() if "deconv_layers.3" not in name}
    state = {name: t for name, t in state.items() if "deconv_layers.4" not in name}
    with pytest.raises(
        UserError, match="has 1 deconvolutions; expected 2 or none for transformers"
    ):
        convert_state_dict(state, "transformers")
    assert "head.deconv_layers.0.weight" in convert_state_dict(state, "mmpose1")[0]
