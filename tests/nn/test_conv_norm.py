"""ConvNorm: folded and unfolded, dense and depthwise."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import kernelpose
from kernelpose.nn import ConvNorm, conv_norm


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


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_the_dtype_of_a_sum_does_not_depend_on_grad_mode(kernel_size: int) -> None:
    layer, x = ConvNorm(4, 4, kernel_size).eval(), torch.randn(1, 4, 5, 5)
    for residual in (x, x.bfloat16()):
        found = []
        for grad in (True, False):
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
                found.append(layer(x, residual=residual))
        assert found[0].dtype == found[1].dtype == residual.dtype
        assert torch.equal(*found)


def pointwise(act: nn.Module | None = None) -> tuple[ConvNorm, Tensor, Tensor]:
    """A 1x1 layer, and maps and a residual for it."""
    torch.manual_seed(0)
    layer = ConvNorm(12, 20, act=act).eval()
    for tensor in (*layer.norm.parameters(), layer.norm.running_mean, layer.norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)
    x, residual = (
        torch.randn(2, c, 5, 7).contiguous(memory_format=torch.channels_last) for c in (12, 20)
    )
    return layer, x, residual


@pytest.mark.parametrize("act", [None, nn.ReLU(), nn.SiLU()])
@pytest.mark.parametrize("size", [(2, 5, 7), (1, 1, 1), (0, 5, 7)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_pointwise_layers_equal_their_convolution(
    act: nn.Module | None, size: tuple[int, int, int], channels_last: bool, added: bool
) -> None:
    layer = pointwise(act)[0]
    batch, *sides = size
    x, residual = torch.randn(batch, 12, *sides), torch.randn(batch, 20, *sides)
    if channels_last:
        x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
    given = [x.clone(), residual.clone()]
    expected = layer.norm(layer.conv(x))
    expected = expected if act is None else act(expected)
    expected = expected + residual if added else expected
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = layer(x, residual=residual if added else None)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, given[0]) and torch.equal(residual, given[1])


@torch.no_grad()
def test_what_was_packed_goes_stale_and_is_never_copied() -> None:
    layer, x, residual = pointwise()
    with mock.patch.object(conv_norm, "packed_linear", wraps=conv_norm.packed_linear) as packed:
        before = layer(x, residual=residual)
        nn.init.uniform_(layer.norm.weight, 2.0, 3.0)
        after = layer(x, residual=residual)
    assert packed.call_count == 2
    torch.testing.assert_close(after, layer.norm(layer.conv(x)) + residual, rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 0.1
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, residual=residual), after)


def test_packed_only_where_nobody_watches() -> None:
    layer, x, residual = pointwise(nn.ReLU())
    with mock.patch.object(conv_norm, "packed_linear", wraps=conv_norm.packed_linear) as packed:
        layer(x)
        with torch.no_grad():
            layer(x.contiguous())
            layer(x, residual=residual)  # which is added after ReLU
            copy.deepcopy(layer).double()(x.double())
            with kernelpose.backend("eager"):
                layer(x)
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
            torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
            assert not packed.called
            layer(x)
            assert packed.call_count == 1
