"""LocalPerception: the figures and the parts of its definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kernelpose
from kernelpose.nn import LocalPerception


def test_parameters_are_those_of_the_specification() -> None:
    module = LocalPerception(768)
    shapes = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    assert shapes == {
        "conv_7x7.weight": (768, 1, 7, 7),
        "conv_7x7.bias": (768,),
        "conv_5x5.weight": (768, 1, 5, 5),
        "conv_5x5.bias": (768,),
        "conv_3x3.weight": (768, 1, 3, 3),
        "conv_3x3.bias": (768,),
        "conv_1x1_final1.weight": (768, 144, 1, 1),
        "conv_1x1_final1.bias": (768,),
        "CA.fc1.weight": (48, 768, 1, 1),
        "CA.fc2.weight": (768, 48, 1, 1),
        "SA.conv1.weight": (1, 2, 7, 7),
    }
    assert round(sum(p.numel() for p in module.parameters()) / 1e6, 3) == 0.251


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_is_its_layers_one_after_the_other(backend: str) -> None:
    torch.manual_seed(0)
    module, x = LocalPerception(64), torch.randn(2, 64, 6, 5)
    branches = [
        layer(x).unflatten(1, (16, 4))
        for layer in (module.conv_7x7, module.conv_5x5, module.conv_3x3)
    ]
    y = module.conv_1x1_final1(torch.cat(branches, 2).flatten(1, 2)) + x
    expected = (module.CA(y) + module.SA(y)) * y
    with kernelpose.backend(backend):
        torch.testing.assert_close(module(x), expected)
        tokens = x.flatten(2).transpose(1, 2).contiguous()
        out = module(tokens.unflatten(1, (6, 5)).permute(0, 3, 1, 2))
    torch.testing.assert_close(out, expected)


def test_trains() -> None:
    module, x = LocalPerception(32), torch.randn(2, 32, 4, 3)
    module(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_compiles_in_one_graph_and_autocasts() -> None:
    torch._dynamo.reset()
    module, x = LocalPerception(32), torch.randn(2, 32, 4, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_stands_in_a_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 4, 4), LocalPerception(32, groups=4, ratio=8))
    assert model(torch.randn(1, 3, 32, 24)).shape == (1, 32, 8, 6)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="groups is 5; expected a divisor of dim, which is 32"):
        LocalPerception(32, groups=5)
    with pytest.raises(ValueError, match="ratio is 64; expected no more than the 32 channels"):
        LocalPerception(32, ratio=64)
