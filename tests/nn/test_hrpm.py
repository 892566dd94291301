"""HRPM v1 and v2: live norms, folded norms, what is kept of them, and sizes."""

from __future__ import annotations

import copy
import io
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import kernelpose
from kernelpose import ops
from kernelpose.nn import AddLayerNorm, DilatedPyramid, HRPMv1, HRPMv2
from kernelpose.nn.folding import fold
from tests.nn.inference import calls_of
from tests.parity import assert_parity


def with_statistics(module: nn.Module) -> Any:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias, std=0.3)
    return module.eval()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def one_by_one(module: nn.Module, x: Tensor, stride: int) -> list[Tensor]:
    maps = []
    for i, dilation in enumerate(module.dilations):
        conv = torch.conv2d(x, module.convs[i].weight, None, 1 if i else stride, dilation, dilation)
        x = module.norms[i](conv).relu()
        maps.append(x)
    return maps


@pytest.mark.parametrize("mode", ["concat", "sum"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(12, 10), (7, 9)])
def test_pyramid(mode: str, training: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = with_statistics(DilatedPyramid(3, 4, (1, 2, 5), stride=2, mode=mode)).train(training)
    x, twin = random(2, 3, *size), copy.deepcopy(module)
    maps = one_by_one(twin, x, stride=2)
    expected = torch.cat(maps, 1) if mode == "concat" else maps[0] + maps[1] + maps[2]
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    for (name, buffer), own in zip(twin.named_buffers(), module.buffers(), strict=True):
        torch.testing.assert_close(own, buffer, msg=f"{name} after training={training}")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(16, 12), (13, 18)])
def test_v1(training: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = with_statistics(HRPMv1(8)).train(training)
    images = random(2, 3, *size)
    maps = torch.cat(one_by_one(copy.deepcopy(module.pyramid), images, stride=2), 1)
    assert maps.shape == (2, 96, -(-size[0] // 2), -(-size[1] // 2))
    expected = module.norm(module.proj(maps).permute(0, 2, 3, 1))
    assert expected.shape == (2, -(-size[0] // 4), -(-size[1] // 4), 8)
    torch.testing.assert_close(module(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(4, 3), (5, 1)])
def test_v2(training: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = with_statistics(HRPMv2(8)).train(training)
    twin, tokens = copy.deepcopy(module), random(2, size[0] * size[1], 8)
    large = twin.up_norm(twin.up(tokens.mT.unflatten(2, size))).relu()
    assert large.shape == (2, 4, 2 * size[0], 2 * size[1])
    total = torch.stack(one_by_one(twin.pyramid, large, stride=1)).sum(0)
    expected = twin.down_norm(twin.down(total)).flatten(2).mT
    torch.testing.assert_close(module(tokens, size), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["concat", "sum"])
@torch.no_grad()
def test_a_pyramid_of_many_channels_runs_one_by_one(mode: str) -> None:
    torch.manual_seed(0)
    module = with_statistics(DilatedPyramid(224, 224, (1, 2, 5), mode=mode))
    x = random(2, 224, 9, 7).contiguous(memory_format=torch.channels_last)
    eager, exact = (
        torch.cat(maps, 1) if mode == "concat" else torch.stack(maps).sum(0)
        for maps in (
            one_by_one(module, x, stride=1),
            one_by_one(copy.deepcopy(module).double(), x.double(), stride=1),
        )
    )
    with mock.patch.object(ops, "dilated_pyramid", wraps=ops.dilated_pyramid) as op:
        assert_parity(module(x), eager, exact)
        assert not op.called
        with kernelpose.backend("eager"):
            assert_parity(module(x), eager, exact)
        assert op.called


@torch.no_grad()
def test_v2_of_many_channels_takes_kernels_for_inference() -> None:
    torch.manual_seed(0)
    module, tokens = with_statistics(HRPMv2(64)), random(3, 30, 64)
    found, ran = calls_of("deconvolution")(lambda: module(tokens, (6, 5)))
    assert ran == 1
    with kernelpose.backend("eager"):
        expected, ran = calls_of("deconvolution")(lambda: module(tokens, (6, 5)))
    assert ran == 0
    exact = copy.deepcopy(module).double()(tokens.double(), (6, 5))
    assert_parity(found, expected, exact)


@pytest.mark.parametrize("batch", [0, 1])
def test_batches(batch: int) -> None:
    with torch.no_grad():
        assert HRPMv1(8).eval()(random(batch, 3, 8, 8)).shape == (batch, 2, 2, 8)
        assert HRPMv2(8).eval()(random(batch, 6, 8), (2, 3)).shape == (batch, 6, 8)


def test_v2_refuses_an_odd_width() -> None:
    with pytest.raises(ValueError, match="dim is 7; expected an even number"):
        HRPMv2(7)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_fold(transposed: bool, bias: bool) -> None:
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv, norm = kind(5, 4, 3, bias=bias).double(), nn.BatchNorm2d(4).double()
    with_statistics(norm)
    other = kind(5, 4, 3).double()
    with torch.no_grad():
        for own, value in zip((other.weight, other.bias), fold(conv, norm), strict=True):
            own.copy_(value)
    x = random(2, 5, 6, 7).double()
    torch.testing.assert_close(other(x), norm(conv(x)))


def test_what_is_kept_follows_the_parameters() -> None:
    module = with_statistics(DilatedPyramid(3, 4, (1, 2)))
    x = random(1, 3, 6, 6)
    with torch.no_grad():
        first = module(x)
        kept = module._folder([(module.convs[0], module.norms[0])])
        assert module._folder([(module.convs[0], module.norms[0])]) is kept
        for change in (
            lambda: module.convs[1].weight.mul_(2),
            lambda: module.norms[0].running_var.add_(1),
            lambda: module.load_state_dict(DilatedPyramid(3, 4, (1, 2)).state_dict()),
            lambda: module.double(),
        ):
            change()
            x = x.to(module.convs[0].weight.dtype)
            expected = torch.cat(one_by_one(module, x, stride=1), 1)
            assert expected.dtype != first.dtype or not torch.equal(expected, first)
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_copies_and_files_hold_nothing_that_is_kept() -> None:
    module = with_statistics(DilatedPyramid(3, 4, (1, 2)))
    with torch.inference_mode():
        expected = module(random(1, 3, 6, 6))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert other._folder._made == []
        torch.testing.assert_close(other(random(1, 3, 6, 6)), expected)


def test_frozen_norms_stay_as_they_are_in_training() -> None:
    module = with_statistics(DilatedPyramid(3, 4, (1, 2))).train()
    for norm in module.norms:
        norm.eval()
    before = [norm.running_mean.clone() for norm in module.norms]
    module(random(2, 3, 6, 6)).sum().backward()
    assert all(torch.equal(n.running_mean, b) for n, b in zip(module.norms, before, strict=True))
    assert all(p.grad is not None for p in module.parameters())


def test_add_layer_norm() -> None:
    torch.manual_seed(0)
    layer, plain = AddLayerNorm(6, eps=1e-3), nn.LayerNorm(6, eps=1e-3)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    plain.load_state_dict(layer.state_dict())
    x, branch = random(2, 5, 6), random(2, 5, 6).flip(1)
    torch.testing.assert_close(layer(x), (x, plain(x)))
    torch.testing.assert_close(layer(x, branch), (x + branch, plain(x + branch)))
