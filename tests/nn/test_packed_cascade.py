"""HEViTPose's attention and projection in one call: equal to its equations, and when it runs."""

from __future__ import annotations

import copy
import functools
import pickle
from unittest import mock

import pytest
import torch
from torch import nn

import kernelpose
from kernelpose import _native
from tests.nn.inference import calls_of, check_deterministic, check_who_gets_it
from tests.nn.test_cascaded_attention import made, maps, twin
from tests.parity import assert_parity

# batch, (h, w), C, groups, heads, sr_ratio
CASES = {
    "even": (2, (8, 6), 32, 2, 2, 2),
    "one-place": (1, (1, 1), 64, 4, 2, 1),
    "one-key": (3, (4, 4), 32, 1, 4, 4),
    "many-places": (1, (26, 14), 96, 4, 3, 2),
    "wide": (1, (16, 12), 384, 4, 2, 2),
    "batch-0": (0, (8, 6), 32, 2, 2, 2),
}
calls = calls_of("cascaded_sr_attention")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_parity(name: str, with_residual: bool, poisoned: None) -> None:
    batch, size, channels, groups, heads, ratio = CASES[name]
    module = made(dim=channels, num_groups=groups, num_heads=heads, sr_ratio=ratio)
    x = maps(batch, size, channels)
    residual = x.flip(1) if with_residual else None
    zero = torch.zeros_like(x) if residual is None else residual
    before = x.clone(), zero.clone()
    with torch.no_grad():
        eager = zero + twin(x, module)
        exact = zero.double() + twin(x.double(), copy.deepcopy(module).double())
        found, ran = calls(lambda: module(x, residual=residual))
        assert ran == (batch > 0)
        assert_parity(found, eager, exact)
        assert found.is_contiguous(memory_format=torch.channels_last)
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(module(last, residual=residual), found)
    assert torch.equal(x, before[0]) and torch.equal(zero, before[1])


def test_deterministic_whatever_the_threads() -> None:
    module, x = made(dim=64, num_groups=2), maps(3, (12, 18), 64)
    check_deterministic(lambda: module(x, residual=x))


def test_who_gets_it() -> None:
    module, x = made(dim=32, num_groups=2), maps(channels=32)
    check_who_gets_it(calls, 1, module, x, tolerance=1e-4)
    with torch.no_grad():
        assert calls(functools.partial(made(), maps()))[1] == 0  # 24 channels
        wide = made(dim=160, num_groups=1)  # channels of a group
        assert calls(functools.partial(wide, maps(channels=160)))[1] == 0
        assert calls(lambda: module.train()(x))[1] == 0
        module.eval().groups[1].norm_v.eps = 0.1
        found, ran = calls(lambda: module(x))
        assert ran == 0
        for norm in (module.groups[1].norm_v, module.groups[0].norm):
            norm.eps = 0.1
        handle = module.groups[0].q.register_forward_hook(lambda *_: None)
        expected = module(x)
        handle.remove()
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
        assert (found - expected).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    ("names", "inputs", "outputs"),
    [("q", 16, 8), ("k v", 16, 8), ("q k v", 16, 8), ("proj", 16, 8), ("proj", 8, 16)],
)
def test_no_weights_of_other_shapes_reach_the_core(names: str, inputs: int, outputs: int) -> None:
    """It would read beyond them; every group is changed alike, so that they can be stacked."""
    module = made(dim=32, num_groups=2)
    for group in module.groups:
        for name in names.split():
            setattr(group, name, nn.Linear(inputs, outputs))
    with (
        mock.patch.object(_native, "call", side_effect=AssertionError("the core was called")),
        pytest.raises((ValueError, RuntimeError)),
    ):
        module(maps(channels=32))


@torch.no_grad()
def test_what_was_packed_goes_stale() -> None:
    module, x = made(dim=32, num_groups=2), maps(channels=32)
    for tensor in (module.proj.norm.running_mean, module.proj.conv.weight, module.groups[1].q.bias):
        before = module(x)
        tensor.add_(1.0)
        after = module(x)
        assert (after - before).abs().max() > 1e-3
        with kernelpose.backend("eager"):
            torch.testing.assert_close(after, module(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), after)
    assert torch.equal(copy.deepcopy(module)(x), after)


@torch.no_grad()
def test_nan_reaches_what_it_reaches_layer_by_layer() -> None:
    module, x = made(dim=32, num_groups=2), maps(2, channels=32)
    x[0, 20, 5, 3] = torch.nan  # of the second group, which the first one does not see
    assert torch.equal(module(x).isnan(), twin(x, module).isnan())
    residual = maps(2, channels=32)
    residual[1, 3, 2, 4] = torch.inf
    found = module(maps(2, channels=32), residual=residual)
    assert torch.equal(found.isinf(), residual.isinf())
