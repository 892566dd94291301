"""ViTPose as a module: shapes, attention forms, data sets, freezing, dtypes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from kernelpose.models import ViTPose
from kernelpose.models.position import resize_position_table
from kernelpose.models.vit import DropPath


def tiny(**options: Any) -> ViTPose:
    torch.manual_seed(0)
    defaults = {"embed_dim": 24, "depth": 2, "num_heads": 2, "image_size": (64, 48)}
    model = ViTPose(**{**defaults, **options}).eval()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, std=0.2)
    return model


def image(batch: int = 2, size: tuple[int, int] = (64, 48)) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("decoder", ["classic", "simple"])
@pytest.mark.parametrize("patch_stride", [16, 8])
@pytest.mark.parametrize("size", [(64, 48), (48, 80), (128, 96)])
def test_heatmaps_are_a_quarter_of_any_image(
    decoder: str, patch_stride: int, size: tuple[int, int]
) -> None:
    model = tiny(decoder=decoder, patch_stride=patch_stride, num_keypoints=5)
    assert model(image(size=size)).shape == (2, 5, size[0] // 4, size[1] // 4)
    assert model.heatmap_size == (16, 12)


def test_equations() -> None:
    """The whole encoder, written out."""
    model = tiny(depth=2)
    encoder, x = model.backbone, image()
    patches = nn.functional.unfold(nn.functional.pad(x, (2, 2, 2, 2)), 16, stride=16)
    weight = encoder.patch_embed.proj.weight.flatten(1)
    tokens = (weight @ patches).transpose(1, 2) + encoder.patch_embed.proj.bias
    tokens = tokens + encoder.pos_embed[:, 1:] + encoder.pos_embed[:, :1]

    def norm(y: torch.Tensor, layer: nn.LayerNorm) -> torch.Tensor:
        centred = y - y.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * layer.weight + layer.bias

    for block in encoder.blocks:
        y = norm(tokens, block.norm1)
        q, k, v = block.attn.qkv(y).reshape(2, 12, 3, 2, 12).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2) / 12**0.5).softmax(-1) @ v
        tokens = tokens + block.attn.proj(mixed.transpose(1, 2).reshape(2, 12, 24))
        y = block.mlp.fc1(norm(tokens, block.norm2))
        tokens = tokens + block.mlp.fc2(y * 0.5 * (1 + torch.erf(y / 2**0.5)))
    expected = norm(tokens, encoder.last_norm).transpose(1, 2).reshape(2, 24, 4, 3)
    torch.testing.assert_close(encoder(x), expected, rtol=1e-4, atol=1e-5)


def test_names_are_the_released_ones() -> None:
    names = {re.sub(r"\.\d+\.", ".#.", name) for name in tiny().state_dict()}
    norm = ("weight", "bias")
    expected = {"backbone.pos_embed", "backbone.pos_grid"}
    for module in (
        "backbone.patch_embed.proj",
        "backbone.blocks.#.norm1",
        "backbone.blocks.#.attn.qkv",
        "backbone.blocks.#.attn.proj",
        "backbone.blocks.#.norm2",
        "backbone.blocks.#.mlp.fc1",
        "backbone.blocks.#.mlp.fc2",
        "backbone.last_norm",
        "keypoint_head.deconv_layers.#",
        "keypoint_head.final_layer",
    ):
        expected |= {f"{module}.{leaf}" for leaf in norm}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    expected |= {f"keypoint_head.deconv_layers.#.{leaf}" for leaf in statistics}
    assert names == expected


def test_the_residual_stream_is_contiguous_tokens() -> None:
    model = tiny(depth=3)
    layouts: list[bool] = []
    for block in model.backbone.blocks:
        block.register_forward_pre_hook(
            lambda module, arguments: layouts.append(arguments[0].is_contiguous())
        )
    model(image())
    assert layouts == [True, True, True]


# Attention forms


def layers(**options: Any) -> list[tuple[object, tuple[int, int], bool]]:
    with torch.device("meta"):
        model = ViTPose(embed_dim=24, depth=12, num_heads=2, **options)
    return [(b.attn.window, b.attn.shift, b.attn.pooled) for b in model.backbone.blocks]


def test_every_second_layer_is_shifted_by_half_a_window() -> None:
    found = layers(attention="window+shift", patch_stride=8)
    assert found == [((8, 8), (0, 0), False), ((8, 8), (4, 4), False)] * 6
    found = layers(attention="window+shift+pool", patch_stride=8, window=(16, 12))
    assert found == [((16, 12), (0, 0), True), ((16, 12), (8, 6), True)] * 6


def test_full_layers_are_3_6_9_12() -> None:
    found = layers(attention="window+shift", patch_stride=8, num_full_layers=4)
    full = [number for number, (window, _, _) in enumerate(found, 1) if window is None]
    shifted = [number for number, (_, shift, _) in enumerate(found, 1) if any(shift)]
    assert full == [3, 6, 9, 12]
    assert shifted == [2, 4, 8, 10]


def test_windows_tile_the_map_at_both_strides() -> None:
    assert layers(attention="window")[0] == ((8, 6), (0, 0), False)
    assert layers(attention="window", patch_stride=8)[0] == ((8, 8), (0, 0), False)
    assert layers() == [(None, (0, 0), False)] * 12


def test_a_window_over_the_whole_map_is_full_attention() -> None:
    full = tiny()
    window = tiny(attention="window", window=(4, 3))
    window.load_state_dict(full.state_dict())
    torch.testing.assert_close(window(image()), full(image()))


def test_a_window_sees_itself_alone_and_a_pooled_one_the_others_too() -> None:
    x = image(1)
    changed = x.clone()
    changed[..., :20, :] += 1  # the upper of two windows; patches reach 2 pixels over their edge
    for attention, alone in (("window", True), ("window+pool", False), ("full", False)):
        options = {} if attention == "full" else {"window": (2, 3)}
        encoder = tiny(attention=attention, depth=1, **options).backbone
        before, after = encoder(x)[..., 2:, :], encoder(changed)[..., 2:, :]
        assert torch.equal(before, after) is alone, attention


# Position table


def test_another_image_size_uses_the_table_of_its_grid() -> None:
    small, large = tiny(), tiny(image_size=(96, 96))
    state = small.state_dict()
    state["backbone.pos_embed"] = resize_position_table(small.backbone.pos_embed, (4, 3), (6, 6))
    state["backbone.pos_grid"] = torch.tensor([6, 6])
    large.load_state_dict(state)
    x = image(size=(96, 96))
    torch.testing.assert_close(small(x), large(x))


def test_a_state_dict_of_another_grid_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"has the grid \(3, 4\); expected .* \(4, 3\)"):
        tiny().load_state_dict(tiny(image_size=(48, 64)).state_dict())


def test_an_official_state_dict_loads_strictly() -> None:
    model = tiny()
    state = model.state_dict()
    del state["backbone.pos_grid"]
    tiny().load_state_dict(state, strict=True)
    assert model.backbone.pos_grid.tolist() == [4, 3]


# Several data sets


def test_each_data_set_has_its_decoder_on_one_encoder() -> None:
    model = tiny(num_keypoints={"coco": 17, "mpii": 16})
    x = image()
    assert model(x, dataset="coco").shape[1] == 17
    assert model(x, dataset="mpii").shape[1] == 16
    expected = model.keypoint_heads["mpii"](model.backbone(x))
    torch.testing.assert_close(model(x, dataset="mpii"), expected)


@pytest.mark.parametrize("dataset", [None, "aic"])
def test_an_unknown_data_set_is_named(dataset: str | None) -> None:
    model = tiny(num_keypoints={"coco": 17, "mpii": 16})
    with pytest.raises(ValueError, match=f"dataset is {dataset!r}; expected one of coco, mpii"):
        model(image(), dataset=dataset)
    with pytest.raises(ValueError, match=r"dataset is .*; expected None, as the model has one"):
        tiny()(image(), dataset="coco")


# Training


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    y = drop.train()(torch.ones(4000, 2, 3))
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (y == y[:, :1, :1]).all()
    assert y.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(drop.eval()(y), y)


def test_drop_path_acts_in_training_alone() -> None:
    model = tiny(drop_path=0.9)
    x = image(8)
    assert torch.equal(model.backbone(x), model.backbone(x))
    model.train()
    assert not torch.equal(model.backbone(x), model.backbone(x))


FROZEN = {
    "attention": r"blocks\.\d\.(attn\.(qkv|proj)|norm1)\.",
    "mlp": r"blocks\.\d\.(mlp\.fc[12]|norm2)\.|patch_embed\.proj\.|pos_embed",
    "encoder": "",
}


@pytest.mark.parametrize("part", FROZEN)
def test_freeze(part: str) -> None:
    model = tiny()
    model.freeze(part)
    for name, parameter in model.named_parameters():
        frozen = name.startswith("backbone.") and re.match(
            FROZEN[part], name.removeprefix("backbone.")
        )
        assert parameter.requires_grad is not bool(frozen), name


def test_a_frozen_encoder_does_not_drop_paths_while_the_decoder_trains() -> None:
    model = tiny(drop_path=0.9).train()
    model.freeze("encoder")
    assert not model.backbone.training
    model.train()
    assert not model.backbone.training and model.keypoint_head.training
    x = image(8)
    assert torch.equal(model.backbone(x), model.backbone(x))
    model(x).sum().backward()
    assert model.backbone.pos_embed.grad is None
    assert model.keypoint_head.final_layer.weight.grad is not None
    model.requires_grad_(True).train()
    assert model.backbone.training


def test_an_unknown_part_is_named_and_nothing_frozen() -> None:
    model = tiny()
    with pytest.raises(
        ValueError, match="parts hold 'ffn'; expected some of attention, mlp, encoder"
    ):
        model.freeze("mlp", "ffn")
    assert all(parameter.requires_grad for parameter in model.parameters())


# Tracing, dtypes, batches


@pytest.mark.parametrize("attention", ["full", "window+shift+pool"])
def test_compiles_into_one_graph_forward_and_backward(attention: str) -> None:
    model = tiny(attention=attention, drop_path=0.1, depth=1 if attention == "full" else 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image()), model(image()))
    model.train()
    compiled(image()).sum().backward()
    assert model.backbone.pos_embed.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near(dtype: torch.dtype) -> None:
    model = tiny()
    expected = model(image())
    found = model.to(dtype)(image().to(dtype))
    assert found.dtype == dtype
    spread = expected.max() - expected.min()
    assert (found.float() - expected).abs().max() / spread < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 1, 64, 48), ValueError, r"\(2, 1, 64, 48\); expected \(B, 3, H, W\)"),
        (torch.zeros(3, 64, 48), ValueError, r"images has shape \(3, 64, 48\); expected"),
        (torch.zeros(1, 3, 8, 48), ValueError, "H, W >= 16"),
        (
            torch.zeros(1, 3, 64, 48, dtype=torch.uint8),
            TypeError,
            "images is torch.uint8; expected .*floating-point",
        ),
    ],
)
def test_wrong_images_are_named(images: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny()(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_stride": 4}, "patch_stride is 4; expected 16 or 8"),
        ({"image_size": (8, 8)}, r"image_size is \(8, 8\); expected .* 16"),
        ({"drop_path": 1.0}, "drop_path is 1.0; expected 0 <= drop_path < 1"),
        ({"attention": "sparse"}, "attention is 'sparse'; expected one of full, window"),
        (
            {"attention": "window", "num_full_layers": 3},
            "num_full_layers is 3; .* divisor of the depth 2",
        ),
        ({"num_full_layers": 2}, "num_full_layers is 2; expected 0 with attention='full'"),
        ({"num_keypoints": {}}, "num_keypoints is {}; expected at least one data set"),
        ({"num_keypoints": {"a.b": 3}}, "without a dot"),
        ({"num_keypoints": {"type": 3}}, "no attribute of nn.ModuleDict"),
        ({"num_keypoints": {"": 3}}, "num_keypoints is .*; expected at least one"),
        ({"num_keypoints": "17"}, "num_keypoints is '17'; expected an integer"),
        ({"image_size": (64, 48, 48)}, r"image_size is \(64, 48, 48\); expected"),
        ({"image_size": (64.0, 48)}, r"image_size is \(64.0, 48\); expected"),
        ({"num_keypoints": {3: 17}}, "num_keypoints is {3: 17}; expected"),
        ({"image_size": 256}, r"image_size is 256; expected \(height, width\)"),
        ({"depth": 0}, "depth is 0; expected at least 1"),
        ({"attention": "window", "num_full_layers": -2}, "num_full_layers is -2; expected 0 or"),
        (
            {"attention": "window", "window": (0, 8)},
            r"window is \(0, 8\); expected \(rows, columns\)",
        ),
        ({"attention": "window", "window": 8}, r"window is 8; expected \(rows, columns\)"),
        ({"window": (8, 8)}, r"window is \(8, 8\); expected None with attention='full'"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)
