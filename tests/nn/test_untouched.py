"""Kernels read the parameters of layers only where that is all there is to a layer.

What users put around or in place of one counts: a hook, an adapter, a quantised layer, pruning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from kernelpose.models.decoders import ClassicDecoder
from kernelpose.models.hevitpose import Block
from kernelpose.models.mobilevit import InvertedResidual
from kernelpose.nn import (
    CRU,
    SRU,
    CascadedGroupSRAttention,
    ConvNorm,
    HRPMv1,
    HRPMv2,
    LocalPerception,
    MixFFN,
    MobileViTBlock,
    MultiScaleModule,
    SRAttention,
)
from kernelpose.nn.untouched import untouched

LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
SIZE = (8, 6)

# A module, the shape of what it takes, and what else it is called with.
Subject = tuple[Callable[[], nn.Module], tuple[int, ...], tuple[Any, ...]]
MAPS, TOKENS = (2, 64, *SIZE), (2, 48, 64)
SUBJECTS: dict[str, Subject] = {
    "ConvNorm": (lambda: ConvNorm(64, 32, act=nn.ReLU()), MAPS, ()),
    "ConvNorm depthwise": (lambda: ConvNorm(64, 64, 3, groups=64), MAPS, ()),
    "ClassicDecoder": (lambda: ClassicDecoder(64, 5, (32,)), MAPS, ()),
    "Block of HEViTPose": (lambda: Block(64, 2, 2, 2, 32), MAPS, ()),
    "CRU": (lambda: CRU(128), (2, 128, *SIZE), ()),
    "SRU": (lambda: SRU(64), MAPS, ()),
    "CascadedGroupSRAttention": (lambda: CascadedGroupSRAttention(64, 2, 2, 2), MAPS, ()),
    "HRPMv1": (lambda: HRPMv1(16), (2, 3, 16, 24), ()),
    "HRPMv2": (lambda: HRPMv2(64), TOKENS, (SIZE,)),
    "LocalPerception": (lambda: LocalPerception(64), MAPS, ()),
    "MixFFN": (lambda: MixFFN(64, 96), TOKENS, (SIZE,)),
    "MixFFN of another width": (lambda: MixFFN(24, 96), (2, 48, 24), (SIZE,)),
    "MobileViTBlock": (lambda: MobileViTBlock(64, 32, 48, 1, 96), MAPS, ()),
    "MultiScaleModule": (lambda: MultiScaleModule(64, 64), MAPS, ()),
    "SRAttention": (lambda: SRAttention(64, 2, 2), TOKENS, (SIZE,)),
    "InvertedResidual": (lambda: InvertedResidual(64, 64, 1, 2, "released"), MAPS, ()),
    "InvertedResidual apple": (lambda: InvertedResidual(64, 64, 1, 2, "apple"), MAPS, ()),
}


class Adapter(nn.Module):
    """What stands in the place of a layer; its forward alone tells what it does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.weight = layer.weight  # which SRU reads, whoever normalises
        self.calls = 0

    def forward(self, *inputs: Tensor) -> Any:
        self.calls += 1
        return self.layer(*inputs)


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A module in eval mode, and a call of it."""
    torch.manual_seed(0)
    build, shape, others = SUBJECTS[request.param]
    module, x = build().eval(), torch.randn(shape)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
        nn.init.normal_(parameter, std=fan_in**-0.5)  # no zeros, no ones
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return module, lambda: module(x, *others)


def replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, layer)


@pytest.mark.parametrize("training", [False, True])
def test_a_hook_sees_its_layer_called(
    subject: tuple[nn.Module, Callable[[], Tensor]], training: bool
) -> None:
    module, call = subject
    module.train(training)
    for name, layer in list(module.named_modules())[1:]:
        if isinstance(layer, nn.ModuleList):
            continue
        seen: list[str] = []
        handle = layer.register_forward_hook(lambda *_, seen=seen: seen.append("called"))
        with torch.set_grad_enabled(training):
            call()
        handle.remove()
        assert seen, name


def test_an_adapter_of_one_layer_changes_nothing_else(
    subject: tuple[nn.Module, Callable[[], Tensor]],
) -> None:
    module, call = subject
    with torch.no_grad():
        expected = call()
        for name, layer in list(module.named_modules()):
            if not isinstance(layer, LAYERS):
                continue
            adapter = Adapter(layer)
            replace(module, name, adapter)
            assert (call() - expected).abs().max() <= 2e-5 * expected.std(), name
            assert adapter.calls, name
            replace(module, name, layer)
        assert torch.equal(call(), expected)


def _others(layer: nn.Module) -> list[nn.Module]:
    """Stock layers of another geometry than that of the one in whose place they come."""
    if isinstance(layer, nn.Linear):
        sizes = layer.in_features, layer.out_features
        return [nn.Linear(*sizes, bias=False), nn.Linear(sizes[0], sizes[1] // 2)]
    if isinstance(layer, nn.ConvTranspose2d):
        sizes = layer.in_channels, layer.out_channels
        return [
            nn.ConvTranspose2d(*sizes, 2, stride=2, bias=False),
            nn.ConvTranspose2d(*sizes, 4, stride=2, padding=2, output_padding=1, bias=False),
        ]
    assert isinstance(layer, nn.Conv2d)
    sizes, kernel = (layer.in_channels, layer.out_channels), layer.kernel_size[0]
    same: dict[str, Any] = {"groups": layer.groups, "bias": layer.bias is not None}
    return [
        nn.Conv2d(*sizes, kernel + 2, layer.stride, kernel // 2 + 1, **same),
        nn.Conv2d(*sizes, 3, layer.stride, 2, dilation=2, **same),
        nn.Conv2d(*sizes, 3, layer.stride, 1, padding_mode="replicate", **same),
        nn.Conv2d(*sizes, kernel, layer.stride, layer.padding, groups=layer.groups, bias=False),
        nn.Conv2d(sizes[0], sizes[1] // 2, kernel, layer.stride, layer.padding),
    ]


@pytest.mark.parametrize("subject", [name for name in SUBJECTS if name != "SRU"], indirect=True)
def test_a_layer_of_another_geometry_is_as_good_as_called(
    subject: tuple[nn.Module, Callable[[], Tensor]],
) -> None:
    """No kernel assumes the geometry that the module was built with, and reads beyond a weight."""
    module, call = subject

    def result() -> Tensor | None:
        try:
            return call()
        except (ValueError, RuntimeError):  # it does not fit its neighbours
            return None

    def called() -> Tensor | None:
        """The result where every layer has a hook, and is called for it."""
        layers = [layer for layer in module.modules() if isinstance(layer, LAYERS)]
        hooks = [layer.register_forward_hook(lambda *_: None) for layer in layers]
        expected = result()
        for hook in hooks:
            hook.remove()
        return expected

    fitting = 0
    with torch.no_grad():
        for name, layer in list(module.named_modules()):
            if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                continue
            for other in _others(layer):
                replace(module, name, other)
                found, expected = result(), called()
                if found is not None:
                    fitting += 1
                    assert expected is not None, (name, other)
                    error = (found - expected).abs().max()
                    assert error <= 2e-5 * expected.std(), (name, other)
            replace(module, name, layer)
    assert fitting


def test_what_leaves_a_layer_untouched_and_what_does_not() -> None:
    def linear() -> nn.Linear:
        return nn.Linear(4, 4)

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    assert untouched(linear(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SyncBatchNorm(4))
    assert not untouched(linear(), Adapter(linear()))

    parametrized = linear()
    parametrize.register_parametrization(parametrized, "weight", Doubled())
    pruned = linear()
    prune.l1_unstructured(pruned, "weight", 0.5)
    hooked = [linear() for _ in range(4)]
    hooked[0].register_forward_hook(lambda *_: None)
    hooked[1].register_forward_pre_hook(lambda *_: None)
    hooked[2].register_full_backward_hook(lambda *_: None)
    hooked[3].register_full_backward_pre_hook(lambda *_: None)
    moved = linear()
    moved.forward = lambda x: x  # type: ignore[method-assign]
    for layer in (parametrized, pruned, *hooked, moved):
        assert not untouched(layer), layer

    handle = (layer := linear()).register_forward_hook(lambda *_: None)
    handle.remove()
    assert untouched(layer)


def test_a_pruned_module_learns_and_its_weights_are_seen() -> None:
    module = ConvNorm(8, 8)
    prune.l1_unstructured(module.conv, "weight", 0.5)
    x = torch.randn(2, 8, 6, 6)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        module.train()(x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        found = module.eval()(x)
        prune.remove(module.conv, "weight")
        torch.testing.assert_close(found, module(x), rtol=0, atol=1e-5)
