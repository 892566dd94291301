"""The plain models that the benchmarks compare with compute what ours do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kernelpose
from benchmarks.plain import copy_weights
from benchmarks.plain.zoo import PLAIN
from tests.parity import assert_parity

SIZE = (64, 128)


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_a_plain_model_is_ours(name: str) -> None:
    torch.manual_seed(0)
    ours = kernelpose.create_model(name, image_size=SIZE).eval()
    for module in ours.modules():
        if isinstance(module, nn.Linear):  # else attention were all but uniform
            nn.init.normal_(module.weight, std=2 * module.in_features**-0.5)
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.3, 0.6)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    plain = PLAIN[name](SIZE).eval()
    copy_weights(ours, plain)
    images = torch.randn(2, 3, *SIZE)
    with kernelpose.backend("eager"):
        eager = joined(ours(images))
        exact = joined(ours.double()(images.double()))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        plain.to(memory_format=memory_format)
        got = joined(plain(images.contiguous(memory_format=memory_format)))
        assert_parity(got, eager, exact, name)


def joined(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return output if isinstance(output, Tensor) else torch.cat(output, 2)
