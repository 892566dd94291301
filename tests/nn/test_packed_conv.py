"""A convolution with its weight arranged: equal to the layer, and when it runs."""

from __future__ import annotations

import copy
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import kernelpose
from kernelpose.models.pvtv2 import PatchEmbed
from kernelpose.nn import packed_conv
from kernelpose.nn.packed_conv import PackedConv

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
    """Inference in float32 of maps in channels_last memory, untouched, where nothing traces."""
    torch.manual_seed(0)
    embed = PatchEmbed(6, 16, 3, 2)
    x = random(2, 6, 8, 6).contiguous(memory_format=LAST)
    with torch.no_grad():
        found, ran = calls(lambda: embed(x))
        assert ran == 1
        with kernelpose.backend("eager"):
            expected, ran = calls(lambda: embed(x))
            assert ran == 0
        torch.testing.assert_close(found, expected)
        assert calls(lambda: embed(x.contiguous()))[1] == 0
        assert calls(lambda: embed(x[:0]))[1] == 0
        assert calls(lambda: copy.deepcopy(embed).double()(x.double()))[1] == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert calls(lambda: embed(x))[1] == 0
        with embed.proj.register_forward_hook(lambda *_: None):
            assert calls(lambda: embed(x))[1] == 0
        assert torch.equal(pickle.loads(pickle.dumps(embed))(x), found)
        assert torch.equal(copy.deepcopy(embed)(x), found)
    with_gradient, ran = calls(lambda: embed(x))
    assert ran == 0
    with_gradient.sum().backward()
    assert all(parameter.grad is not None for parameter in embed.parameters())
    compiled, ran = calls(lambda: torch.compile(embed, fullgraph=True, backend="eager")(x))
    assert ran == 0
    torch.testing.assert_close(compiled, expected)
