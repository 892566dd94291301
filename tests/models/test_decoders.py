"""Decoders, against their equations written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernelpose.models.decoders import build_decoder


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, 8, 4, 3, generator=torch.Generator().manual_seed(0))


def test_simple_is_relu_then_bilinear_then_convolution(features: torch.Tensor) -> None:
    decoder = build_decoder("simple", 8, 5, upsample=4)
    big = F.interpolate(features.clamp(min=0), (16, 12), mode="bilinear", align_corners=False)
    expected = F.conv2d(big, decoder.final_layer.weight, decoder.final_layer.bias, padding=1)
    torch.testing.assert_close(decoder(features), expected)


@pytest.mark.parametrize(("upsample", "channels"), [(4, (6, 7)), (2, (6,))])
def test_classic_is_deconvolutions_then_1x1(
    features: torch.Tensor, upsample: int, channels: tuple[int, ...]
) -> None:
    decoder = build_decoder("classic", 8, 5, upsample=upsample, deconv_channels=channels).eval()
    x = features
    for number in range(len(channels)):
        deconv, norm = decoder.deconv_layers[3 * number], decoder.deconv_layers[3 * number + 1]
        torch.nn.init.normal_(deconv.weight)
        torch.nn.init.normal_(norm.running_mean)
        x = F.conv_transpose2d(x, deconv.weight, stride=2, padding=1)
        x = (x - norm.running_mean[:, None, None]) / (norm.running_var + 1e-5).sqrt()[:, None, None]
        x = x.clamp(min=0)
    expected = F.conv2d(x, decoder.final_layer.weight)
    assert decoder(features).shape == (2, 5, 4 * upsample, 3 * upsample)
    torch.testing.assert_close(decoder(features), expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("simcc", {}, "decoder is 'simcc'; expected 'classic' or 'simple'"),
        ("classic", {"deconv_channels": (256,)}, r"deconv_channels is \(256,\); expected 2 widths"),
        (
            "simple",
            {"deconv_channels": (256, 256)},
            r"deconv_channels is \(256, 256\); expected None",
        ),
    ],
)
def test_wrong_arguments_are_named(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_decoder(name, 8, 5, upsample=4, **options)


def test_no_keypoints_are_refused() -> None:
    with pytest.raises(ValueError, match="num_keypoints is 0; expected an integer"):
        build_decoder("simple", 8, 0, upsample=4)
