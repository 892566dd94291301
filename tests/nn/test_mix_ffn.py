"""MixFFN beside what timm writes, in one call and layer by layer, and when which runs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernelpose.nn import MixFFN
from tests.nn.inference import calls_of, check_deterministic, check_who_gets_it
from tests.parity import assert_parity

# (batch, (h, w), C, hidden, outputs)
CASES = {
    "even": (2, (8, 6), 32, 128, 32),
    "odd": (3, (9, 7), 37, 100, 16),
    "one-pixel": (2, (1, 1), 8, 64, 16),
    "one-row": (1, (1, 9), 16, 65, 48),
    "one-column": (1, (13, 1), 150, 30, 80),
    "two-depths": (1, (4, 3), 300, 192, 208),
    "strips": (2, (48, 40), 16, 70, 32),
    "strips-of-a-row": (1, (5, 800), 8, 24, 16),
    "many-images": (40, (6, 5), 24, 96, 32),
    "batch-0": (0, (8, 6), 32, 128, 32),
}


def layer_by_layer(mlp: MixFFN, x: Tensor, size: tuple[int, int]) -> Tensor:
    maps = mlp.dwconv(mlp.fc1(x).mT.unflatten(2, size))
    y: Tensor = mlp.fc2(F.gelu(maps.flatten(2).mT))
    return y


def case(name: str) -> tuple[MixFFN, Tensor, tuple[int, int]]:
    batch, size, channels, hidden, outputs = CASES[name]
    torch.manual_seed(0)
    mlp = MixFFN(channels, hidden, outputs)
    return mlp, torch.randn(batch, size[0] * size[1], channels), size


calls = calls_of("mix_ffn")


@pytest.mark.parametrize("name", CASES)
def test_parity(name: str, poisoned: None) -> None:
    mlp, x, size = case(name)
    with torch.no_grad():
        eager = layer_by_layer(mlp, x, size)
        exact = layer_by_layer(copy.deepcopy(mlp).double(), x.double(), size)
        found, ran = calls(lambda: mlp(x, size))
        assert ran == (x.numel() > 0)
        assert_parity(found, eager, exact)
        assert torch.equal(mlp(F.pad(x, (1, 0))[..., 1:], size), found)


@pytest.mark.parametrize("batch", [0, 2])
def test_layers_and_gradients(batch: int) -> None:
    mlp, x, size = case("even")
    x = x[:batch].requires_grad_()
    found, ran = calls(lambda: mlp(x, size))
    assert ran == 0
    expected = layer_by_layer(mlp, x, size)
    torch.testing.assert_close(found, expected)
    for own, other in zip(
        torch.autograd.grad(found.sum(), [x, *mlp.parameters()]),
        torch.autograd.grad(expected.sum(), [x, *mlp.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    assert set(mlp.state_dict()) == {
        f"{layer}.{leaf}" for layer in ("fc1", "dwconv", "fc2") for leaf in ("weight", "bias")
    }


@pytest.mark.parametrize("name", ["even", "strips", "many-images", "one-pixel"])
def test_deterministic_whatever_the_threads(name: str) -> None:
    mlp, x, size = case(name)
    check_deterministic(lambda: mlp(x, size))


def test_who_gets_it() -> None:
    mlp, x, size = case("even")
    check_who_gets_it(calls, 1, mlp, x, size)
    with torch.no_grad():
        narrow = MixFFN(32, 64, 24)
        assert calls(lambda: narrow(x, size))[1] == 0
        with pytest.raises(ValueError, match="size"):
            mlp(x, (8, 5))


def test_what_was_packed_goes_stale() -> None:
    mlp, x, size = case("odd")
    with torch.no_grad():
        before = mlp(x, size)
        for parameter in mlp.parameters():
            parameter.add_(0.1)
            after = mlp(x, size)
            assert not torch.allclose(after, before)
            torch.testing.assert_close(after, layer_by_layer(mlp, x, size))
            before = after
        assert torch.equal(pickle.loads(pickle.dumps(mlp))(x, size), after)
        assert torch.equal(copy.deepcopy(mlp)(x, size), after)


def test_nan_reaches_what_it_reaches_layer_by_layer() -> None:
    mlp, x, size = case("strips")
    with torch.no_grad():
        for token in (0, 763, 1919):
            bad = x.clone()
            bad[1, token, 3] = torch.nan
            assert torch.equal(mlp(bad, size).isnan(), layer_by_layer(mlp, bad, size).isnan())
