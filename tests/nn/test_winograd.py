"""WinogradConv: equal to the layers, and when it runs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from kernelpose.nn import ConvNorm, MobileViTBlock
from kernelpose.nn.winograd import WinogradConv
from tests.nn.inference import calls_of, check_who_gets_it

# (batch, C, outputs, (h, w))
CASES = {
    "even": (2, 32, 64, (8, 6)),
    "odd": (1, 96, 32, (9, 11)),
    "wide": (1, 320, 160, (8, 6)),
    "one-image-of-many-tiles": (1, 64, 96, (32, 24)),
}


def conv_norm(inputs: int, outputs: int) -> ConvNorm:
    torch.manual_seed(0)
    layer = ConvNorm(inputs, outputs, 3).eval()
    for tensor in (layer.norm.weight, layer.norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)
    for tensor in (layer.norm.bias, layer.norm.running_mean):
        nn.init.normal_(tensor)
    return layer


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_parity(name: str) -> None:
    """Of a convolution with a bias, and of one with a norm; Winograd's way costs a few digits."""
    batch, inputs, outputs, size = CASES[name]
    layer, biased = conv_norm(inputs, outputs), nn.Conv2d(inputs, outputs, 3, padding=1)
    x = torch.randn(batch, inputs, *size, generator=torch.Generator().manual_seed(1))
    before, exact = x.clone(), x.double()
    for layers in ((layer.conv, layer.norm), (biased,)):
        plain = nn.Sequential(*layers)
        expected = copy.deepcopy(plain).double()(exact)
        fused = WinogradConv()
        assert fused.suits(x, *layers)
        found = fused(x, *layers)
        error, of_plain = ((y - expected).abs().max() for y in (found, plain(x)))
        assert error < 4 * of_plain
        assert found.is_contiguous(memory_format=torch.channels_last)
        tokens = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(fused(tokens, *layers), found)
    assert torch.equal(x, before)


calls = calls_of("winograd_conv")


def test_who_gets_it() -> None:
    module = MobileViTBlock(32, 64, 48, 1, 96).eval()
    x = torch.randn(2, 32, 8, 6)
    check_who_gets_it(calls, 2, module, x, tolerance=1e-4)
    with torch.no_grad():
        assert calls(lambda: module(x[..., :4, :4]))[1] == 0  # too few tiles
        assert calls(lambda: module(x[:0]))[1] == 0
        assert calls(lambda: ConvNorm(32, 32, 3, stride=2).eval()(x))[1] == 0
        assert calls(lambda: ConvNorm(32, 32, 3, groups=32).eval()(x))[1] == 0
        assert calls(lambda: ConvNorm(32, 32, 5).eval()(x))[1] == 0
        assert calls(lambda: ConvNorm(32, 32, 3)(x))[1] == 0  # live statistics


@torch.no_grad()
def test_what_was_packed_goes_stale() -> None:
    layer, x = conv_norm(32, 64), torch.randn(1, 32, 8, 6)
    before = layer(x)
    layer.norm.running_mean.add_(1.0)
    after = layer(x)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, layer.norm(layer.conv(x)), rtol=1e-4, atol=1e-5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), after)


@torch.no_grad()
def test_a_residual_and_an_activation_follow() -> None:
    layer, x = conv_norm(32, 32), torch.randn(1, 32, 8, 6)
    layer.act = nn.ReLU()
    expected = x + layer.norm(layer.conv(x)).relu()
    torch.testing.assert_close(layer(x, residual=x), expected, rtol=1e-4, atol=1e-5)
