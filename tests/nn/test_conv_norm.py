"""ConvNorm: folded and unfolded, dense and depthwise."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from kernelpose.nn import ConvNorm


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("relu", [False, True])
def test_folded_equals_layer_by_layer(groups: int, stride: int, relu: bool) -> None:
    torch.manual_seed(0)
    act = nn.ReLU() if relu else None
    layer = ConvNorm(12, 24, 3, stride=stride, groups=groups, act=act).double().eval()
    for tensor in (*layer.norm.parameters(), layer.norm.running_mean, layer.norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)
    x = torch.randn(2, 12, 9, 8, dtype=torch.float64)
    y = layer.norm(layer.conv(x))
    expected = torch.relu(y) if relu else y
    torch.testing.assert_close(layer(x), expected)  # folded in the graph
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)  # folded and kept
    torch.testing.assert_close(
        torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())),
        torch.autograd.grad(expected.square().sum(), list(layer.parameters())),
    )
    layer.train()
    y = nn.functional.batch_norm(
        layer.conv(x), None, None, layer.norm.weight, layer.norm.bias, True
    )
    torch.testing.assert_close(layer(x), torch.relu(y) if relu else y)


def test_what_was_folded_goes_stale() -> None:
    layer, x = ConvNorm(4, 6, norm_name="bn").eval(), torch.randn(1, 4, 5, 5)
    assert {name.split(".")[0] for name in layer.state_dict()} == {"conv", "bn"}
    with torch.no_grad():
        before = layer(x)
        layer.bn.running_mean.add_(1.0)
        torch.testing.assert_close(layer(x), layer.bn(layer.conv(x)))
        assert not torch.allclose(layer(x), before)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
