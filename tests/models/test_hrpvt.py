"""HRPVT as a module: written out, counted, heads, insertion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpose.models import HRPVT, PVTv2
from kernelpose.models.counting import count

DECODERS = ("simcc", "classic", "simple")


def tiny(**options: Any) -> HRPVT:
    torch.manual_seed(0)
    defaults = {
        "embed_dims": (16, 32, 40, 64),
        "depths": (2, 1, 1, 1),
        "image_size": (64, 48),
        "num_keypoints": 5,
    }
    model = HRPVT(**{**defaults, **options}).eval()
    for name, parameter in model.named_parameters():
        if not ("norm" in name and name.endswith("weight")):
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def image(batch: int = 2, size: tuple[int, int] = (64, 48)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def test_counts_do_not_depend_on_the_device() -> None:
    model = tiny(image_size=(64, 32))
    with torch.device("meta"):
        on_meta = tiny(image_size=(64, 32))
    assert count(model, (64, 32)) == count(on_meta, (64, 32))


def _norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def _bn(x: Tensor, layer: nn.BatchNorm2d) -> Tensor:
    mean, variance, weight, bias = (
        t.view(1, -1, 1, 1)
        for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return (x - mean) / (variance + layer.eps).sqrt() * weight + bias


def _chain(x: Tensor, pyramid: nn.Module, stride: int = 1) -> list[Tensor]:
    maps = []
    for i, (conv, norm) in enumerate(zip(pyramid.convs, pyramid.norms, strict=True)):
        dilation = (1, 2, 5)[i % 3]
        y = F.conv2d(x, conv.weight, None, 1 if i else stride, dilation, dilation)
        x = F.relu(_bn(y, norm))
        maps.append(x)
    return maps


def _attention(x: Tensor, size: tuple[int, int], attn: nn.Module) -> Tensor:
    heads, ratio = attn.num_heads, attn.sr_ratio
    reduced = x
    if ratio > 1:
        maps = F.conv2d(x.mT.unflatten(2, size), attn.sr.weight, attn.sr.bias, ratio)
        reduced = _norm(maps.flatten(2).mT, attn.norm)
    q = attn.q(x).unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = attn.kv(reduced).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return attn.proj(mixed.transpose(1, 2).flatten(2))


def _mlp(x: Tensor, size: tuple[int, int], mlp: nn.Module) -> Tensor:
    maps = mlp.fc1(x).mT.unflatten(2, size)
    conv = F.conv2d(maps, mlp.dwconv.weight, mlp.dwconv.bias, padding=1, groups=maps.shape[1])
    return mlp.fc2(F.gelu(conv).flatten(2).mT)


def _hrpm(x: Tensor, size: tuple[int, int], hrpm: nn.Module) -> Tensor:
    maps = x.mT.unflatten(2, size)
    large = F.conv_transpose2d(maps, hrpm.up.weight, None, 2, 1)
    total = sum(_chain(F.relu(_bn(large, hrpm.up_norm)), hrpm.pyramid))
    return _bn(F.conv2d(total, hrpm.down.weight, None, 2, 1), hrpm.down_norm).flatten(2).mT


@pytest.mark.parametrize("insertion", ["none", "vanilla", "layer", "stage"])
def test_equations(insertion: str) -> None:
    """Specs 5 to 5d."""
    model, x = tiny(insertion=insertion), image()
    backbone, head = model.backbone, model.keypoint_head
    with_hrpm = {
        "none": (),
        "vanilla": ((0, 1),),
        "layer": ((0, 0), (0, 1)),
        "stage": ((0, 1), (1, 0), (2, 0), (3, 0)),
    }[insertion]
    y = torch.cat(_chain(x, backbone.stem.pyramid, stride=2), 1)
    y = F.conv2d(y, backbone.stem.proj.weight, backbone.stem.proj.bias, 2, 1)
    for s, stage in enumerate(backbone.stages):
        if s:
            proj = stage.downsample.proj
            y = F.conv2d(y, proj.weight, proj.bias, 2, 1)
        size = (y.shape[2], y.shape[3])
        tokens = _norm(y.flatten(2).mT, stage.downsample.norm if s else backbone.stem.norm)
        for b, block in enumerate(stage.blocks):
            tokens = tokens + _attention(_norm(tokens, block.norm1), size, block.attn)
            tokens = tokens + _mlp(_norm(tokens, block.norm2), size, block.mlp)
            assert (block.hrpm is not None) == ((s, b) in with_hrpm)
            if block.hrpm is not None:
                tokens = tokens + _hrpm(tokens, size, block.hrpm)
        y = _norm(tokens, stage.norm).mT.unflatten(2, size)
    maps = F.conv2d(y, head.final_layer.weight, head.final_layer.bias).flatten(2)
    expected = (head.mlp_head_x(maps), head.mlp_head_y(maps))
    assert [tuple(e.shape) for e in expected] == [(2, 5, 96), (2, 5, 128)]
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


def test_without_hrpm_it_is_pvt_v2() -> None:
    model = tiny(insertion="none", hrpm_v1=False)
    backbone = PVTv2(embed_dims=(16, 32, 40, 64), depths=(2, 1, 1, 1)).eval()
    backbone.load_state_dict(model.backbone.state_dict())
    assert torch.equal(backbone(image()), model.backbone(image()))


@pytest.mark.parametrize("size", [(64, 48), (32, 96), (101, 75)])
def test_simcc_bins_of_any_size(size: tuple[int, int]) -> None:
    x, y = tiny(image_size=size)(image(size=size))
    assert x.shape == (2, 5, 2 * size[1])
    assert y.shape == (2, 5, 2 * size[0])
    x, y = tiny(image_size=size, split_ratio=3)(image(size=size))
    assert (x.shape[2], y.shape[2]) == (3 * size[1], 3 * size[0])


@pytest.mark.parametrize("decoder", ["classic", "simple"])
def test_heatmaps_are_a_quarter_of_any_image(decoder: str) -> None:
    model = tiny(decoder=decoder)
    assert model.heatmap_size == (16, 16)  # a map of 2 x 2
    for size in ((64, 64), (32, 96)):
        assert model(image(size=size)).shape == (2, 5, size[0] // 4, size[1] // 4)


def test_a_simcc_head_takes_its_own_size_alone() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 3, 64, 48\), the size whose bins"):
        tiny()(image(size=(64, 64)))


def test_live_norms_and_folded_ones_give_one_gradient_in_eval_mode() -> None:
    """In eval mode with gradient: as the modules one by one, with the statistics they keep."""
    model, x = tiny(), image()
    names = ["backbone.stem.pyramid.convs.0.weight", "backbone.stages.0.blocks.0.hrpm.up.weight"]
    parameters = [model.get_parameter(name) for name in names]
    found = torch.autograd.grad(model(x)[0].square().mean(), parameters)
    for module in model.modules():  # live to `can_fold`, yet with the kept statistics
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.forward = lambda y, norm=module: _bn(y, norm)
    expected = torch.autograd.grad(model(x)[0].square().mean(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_decoder_a_data_set() -> None:
    model = tiny(num_keypoints={"coco": 5, "mpii": 4})
    assert [tuple(t.shape) for t in model(image(), dataset="mpii")] == [(2, 4, 96), (2, 4, 128)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"insertion": "all"}, "insertion is 'all'; expected one of none, vanilla, layer, stage"),
        ({"decoder": "heatmap"}, "decoder is 'heatmap'; expected one of simcc, classic, simple"),
        ({"image_size": (16, 64)}, r"image_size is \(16, 64\); expected"),
        ({"deconv_channels": (8,)}, r"deconv_channels is \(8,\); expected None with decoder='simc"),
        ({"split_ratio": 0}, "split_ratio is 0; expected a positive number"),
        ({"num_keypoints": 0}, "num_keypoints is 0; expected"),
        ({"drop_path": 1.0}, "drop_path is 1.0; expected"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)
