"""A convolution with its weight arranged: equal to the layer, and when it runs."""

from __future__ import annotations

import copy
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from kernelpose.models.pvtv2 import PatchEmbed
from kernelpose.nn import ConvNorm, packed_conv
from kernelpose.nn.packed_conv import PackedConv
from tests.nn.inference import check_who_gets_it

pytestmark = pytest.mark.skipif(not packed_conv._HAS_ONEDNN, reason="this torch has no oneDNN")

LAST = torch.channels_last


def calls(function: Any) -> tuple[Tensor, int]:
    """A result, and how many convolutions ran packed for it."""
    original = torch.ops.mkldnn._convolution_pointwise
    with mock.patch.object(torch.ops.mkldnn, "_convolution_pointwise", wraps=original) as ran:
        return function(), ran.call_count


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"padding": (1, 0), "stride": (1, 2)},
        {"groups": 2, "dilation": 2},
        {"padding": 1, "padding_mode": "reflect"},
    ],
)
def test_equal_to_the_layer(options: dict[str, Any], batch: int, bias: bool) -> None:
    torch.manual_seed(0)
    conv, packed = nn.Conv2d(6, 20, 3, bias=bias, **options), PackedConv()
    x = random(batch, 6, 9, 7).contiguous(memory_format=LAST)
    with torch.no_grad():
        assert packed.suits(x, conv) == (conv.padding_mode == "zeros")
        if not packed.suits(x, conv):
            return
        found = packed(x, conv)
        torch.testing.assert_close(found, conv(x), rtol=1e-5, atol=1e-5)
        assert found.is_contiguous(memory_format=LAST)
        conv.weight.mul_(2)
        torch.testing.assert_close(packed(x, conv), conv(x), rtol=1e-5, atol=1e-5)


def test_who_gets_it() -> None:
    """Besides, maps in channels_last memory alone."""
    torch.manual_seed(0)
    embed = PatchEmbed(6, 16, 3, 2)
    x = random(2, 6, 8, 6).contiguous(memory_format=LAST)
    check_who_gets_it(calls, 1, embed, x)
    with torch.no_grad():
        assert calls(lambda: embed(x.contiguous()))[1] == 0
        assert calls(lambda: embed(x[:0]))[1] == 0
        for twin in (copy.deepcopy(embed), pickle.loads(pickle.dumps(embed))):
            assert torch.equal(twin(x), embed(x))


def test_a_norm_is_folded() -> None:
    torch.manual_seed(0)
    layer, x = ConvNorm(6, 20, 3, stride=2).eval(), random(2, 6, 9, 7)
    for tensor in (layer.norm.weight.data, layer.norm.bias.data, layer.norm.running_var):
        tensor.uniform_(0.5, 2)
    layer.norm.running_mean.normal_()
    check_who_gets_it(calls, 1, layer, x.contiguous(memory_format=LAST))
    with torch.no_grad():
        assert calls(lambda: ConvNorm(6, 6, 3, stride=2, groups=6).eval()(x))[1] == 0
        assert calls(lambda: ConvNorm(6, 20, 3, stride=2)(x))[1] == 0  # live statistics
