"""Half a block of HEViTPose in one call: equal to the layers, and when it runs."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernelpose
from kernelpose.models.hevitpose import Block
from kernelpose.nn.depthwise_ffn import DepthwiseFFN
from tests.nn.inference import calls_of, check_deterministic, check_who_gets_it
from tests.parity import assert_parity

# (batch, C, hidden, (h, w))
CASES = {
    "one-pixel": (1, 32, 64, (1, 1)),
    "one-row": (2, 32, 32, (1, 9)),
    "one-column": (1, 64, 32, (7, 1)),
    "narrow": (3, 32, 96, (5, 3)),
    "many-pixels": (2, 96, 64, (13, 17)),
    "wide": (1, 160, 320, (16, 12)),
    "batch-0": (0, 32, 64, (4, 6)),
}


def block(channels: int, hidden: int) -> Block:
    torch.manual_seed(0)
    made = Block(channels, 4, 2, 1, hidden).eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 2.0)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor)
    return made


def layers(made: Block) -> Any:
    return made.dwconv1, made.ffn1.fc1, made.ffn1.fc2


def one_by_one(x: Tensor, made: Block) -> Tensor:
    (depthwise, norm), (expand, norm1), (project, norm2) = (layer.pair for layer in layers(made))
    y = x + norm(depthwise(x))
    return y + norm2(project(norm1(expand(y)).relu()))


@pytest.mark.parametrize("name", CASES)
def test_parity(name: str, poisoned: None) -> None:
    batch, channels, hidden, size = CASES[name]
    made = block(channels, hidden)
    x = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))
    before = x.clone()
    with torch.no_grad():
        eager = one_by_one(x, made)
        exact = one_by_one(x.double(), copy.deepcopy(made).double())
        fused = DepthwiseFFN()
        assert fused.suits(x, layers(made))
        found = fused(x, layers(made))
        assert_parity(found, eager, exact)
        assert found.is_contiguous(memory_format=torch.channels_last)
        padded = nn.functional.pad(x, (1, 0))[..., 1:]
        for same in (x.contiguous(memory_format=torch.channels_last), padded):
            assert torch.equal(fused(same, layers(made)), found)
    assert torch.equal(x, before)


def test_deterministic_whatever_the_threads() -> None:
    made, x = block(64, 96), torch.randn(3, 64, 13, 17)
    check_deterministic(lambda: DepthwiseFFN()(x, layers(made)))


calls = calls_of("depthwise_ffn")


def test_who_gets_it() -> None:
    made, x = block(32, 64), torch.randn(2, 32, 4, 6)
    check_who_gets_it(calls, 2, made, x, tolerance=1e-4)
    with torch.no_grad():
        for sizes in ((48, 64), (32, 48)):
            odd = torch.randn(1, sizes[0], 4, 6)
            assert calls(functools.partial(block(*sizes), odd))[1] == 0
        assert calls(lambda: made.train()(x))[1] == 0


@torch.no_grad()
def test_what_was_packed_goes_stale() -> None:
    made, x = block(32, 64), torch.randn(1, 32, 4, 6)
    for layer in (made.dwconv2, made.ffn1.fc1, made.ffn2.fc2):
        before = made(x)
        layer.get_buffer("norm.running_mean").add_(1.0)
        after = made(x)
        assert (after - before).abs().max() > 1e-3
        with kernelpose.backend("eager"):
            torch.testing.assert_close(after, made(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(pickle.loads(pickle.dumps(made))(x), after)
    assert torch.equal(copy.deepcopy(made)(x), after)


@torch.no_grad()
def test_nan_reaches_what_it_reaches_layer_by_layer() -> None:
    made = block(32, 64)
    for row, column in ((2, 7), (3, 2), (0, 0), (4, 5)):
        x = torch.randn(1, 32, 5, 8)
        x[0, 1, row, column] = torch.nan
        found = DepthwiseFFN()(x, layers(made))
        assert torch.equal(found.isnan(), one_by_one(x, made).isnan())
