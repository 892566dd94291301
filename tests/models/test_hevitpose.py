"""HEViTPose as a module: counted, written out, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernelpose
from kernelpose.models import HEViTPose
from kernelpose.models.counting import count
from tests.models.test_counting import billion, million
from tests.nn.test_cascaded_attention import twin

DECODERS = ("classic", "simple")


def tiny(**options: Any) -> HEViTPose:
    torch.manual_seed(0)
    defaults = {
        "embed_dims": (16, 24, 32),
        "depths": (1, 2, 1),
        "num_groups": 2,
        "image_size": (64, 32),
        "num_keypoints": 5,
    }
    model = HEViTPose(**{**defaults, **options}).eval()
    for name, parameter in model.named_parameters():
        if not ("norm" in name and name.endswith("weight")):
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def image(batch: int = 2, size: tuple[int, int] = (64, 32)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


# name: parameters M, layers G, hooked G, all G of the specification, MPII at 256 x 256; published
# parameters M and G, which are `hooked`
COUNTS = {
    "hevitpose-t": ((3.215, 1.729, 1.760, 1.855), (3.21, 1.75)),
    "hevitpose-s": ((5.851, 3.581, 3.629, 3.782), (5.88, 3.64)),
    "hevitpose-b": ((10.599, 5.583, 5.639, 5.817), (10.63, 5.58)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_costs_what_the_specification_counts(name: str) -> None:
    with torch.device("meta"):
        model = kernelpose.create_model(name, image_size=(256, 256), num_keypoints=16)
    counted = count(model, (256, 256))
    found = (million(counted.parameters), *map(billion, (counted.layers, counted.hooked)))
    expected, published = COUNTS[name]
    assert (*found, billion(counted.all)) == expected
    assert (found[0], found[2]) == pytest.approx(published, rel=0.02)


def test_counts_do_not_depend_on_the_device() -> None:
    model = tiny()
    with torch.device("meta"):
        on_meta = tiny()
    assert count(model, (64, 32)) == count(on_meta, (64, 32))


def _layer(x: Tensor, layer: nn.Module) -> Tensor:
    y = F.conv2d(
        x, layer.conv.weight, None, layer.conv.stride, layer.conv.padding, 1, layer.conv.groups
    )
    norm = layer.norm
    y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False)
    return y if layer.act is None else F.relu(y)


def test_equations() -> None:
    """Specs 3."""
    model, x = tiny(), image()
    y = x
    for stage, (kernel, stride) in zip(
        model.backbone.stages, ((7, 4), (3, 2), (3, 2)), strict=True
    ):
        conv = stage.embed.conv
        assert (conv.kernel_size, conv.stride) == ((kernel, kernel), (stride, stride))
        y = _layer(y, stage.embed)
        for block in stage.blocks:
            assert isinstance(block.ffn1.fc1.act, nn.ReLU)
            assert block.ffn1.fc2.act is None
            for dwconv, ffn in ((block.dwconv1, block.ffn1), (block.dwconv2, block.ffn2)):
                y = y + _layer(y, dwconv)
                y = y + _layer(_layer(y, ffn.fc1), ffn.fc2)
                if dwconv is block.dwconv1:
                    y = y + twin(y, block.attn)
    expected = model.keypoint_head(y)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("size", "joints"), [((256, 256), 16), ((256, 192), 17)])
def test_the_released_inputs(size: tuple[int, int], joints: int) -> None:
    with torch.device("meta"):
        model = kernelpose.create_model("hevitpose-b", image_size=size, num_keypoints=joints)
        heatmaps = model.eval()(torch.zeros(1, 3, *size))
    assert heatmaps.shape == (1, joints, size[0] // 4, size[1] // 4)
    attn = model.backbone.stages[2].blocks[3].attn
    assert (len(attn.groups), attn.groups[0].num_heads, attn.sr_ratio) == (4, 2, 2)


@pytest.mark.parametrize("decoder", DECODERS)
def test_heatmaps_are_a_quarter_of_any_image(decoder: str) -> None:
    model = tiny(decoder=decoder)
    assert model.heatmap_size == (16, 8)
    for size in ((64, 64), (32, 96)):
        assert model(image(size=size)).shape == (2, 5, size[0] // 4, size[1] // 4)


def test_an_image_that_the_strides_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images has shape \(2, 3, 64, 48\); expected H and W mu"):
        tiny()(image(size=(64, 48)))
    assert tiny(sr_ratios=(4, 2, 1))(image(size=(64, 48))).shape == (2, 5, 16, 12)


def test_a_decoder_a_data_set() -> None:
    model = tiny(num_keypoints={"coco": 17, "mpii": 16})
    assert model(image(), dataset="mpii").shape == (2, 16, 16, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (64, 48)}, r"image_size is \(64, 48\); expected .*, multiples of 32\."),
        ({"image_size": 256}, r"image_size is 256; expected"),
        ({"depths": (1, 2)}, r"depths is \(1, 2\); expected three positive numbers"),
        ({"sr_ratios": (8, 0, 2)}, r"sr_ratios is \(8, 0, 2\); expected three positive numbers"),
        ({"embed_dims": (16, 25, 32)}, "num_groups is 2; expected a divisor of the 25 channels"),
        ({"ffn_ratio": 0}, "ffn_ratio is 0; expected a positive number"),
        ({"decoder": "simcc"}, "decoder is 'simcc'; expected 'classic' or 'simple'"),
        ({"deconv_channels": (8,)}, r"deconv_channels is \(8,\); expected 2 widths"),
        ({"num_keypoints": 0}, "num_keypoints is 0; expected"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)
