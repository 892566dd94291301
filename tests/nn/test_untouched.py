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
