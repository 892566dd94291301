"""SRU is spatial_gate with the parameters of the released code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kernelpose
from kernelpose.nn import SRU


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in module.state_dict().items()}


def test_state_dict_is_that_of_the_released_code() -> None:
    assert _shapes(SRU(32)) == {"gn.weight": (32,), "gn.bias": (32,)}
    assert SRU(32).gn.num_groups == 16


def test_is_the_op_with_its_options() -> None:
    module = SRU(32, 4, 0.52)
    torch.nn.init.normal_(module.gn.bias)
    x = torch.randn(2, 32, 5, 3)
    expected = kernelpose.ops.spatial_gate(
        x, module.gn.weight, module.gn.bias, groups=4, threshold=0.52
    )
    assert torch.equal(module(x), expected)
    assert "gate_treshold=0.52" in repr(module)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((7, 1), "oup_channels is 7; expected an even number"),
        ((8, 3), "group_num is 3; expected a divisor of oup_channels, which is 8"),
        ((16, 4, 0.5, False), "torch_gn is False; expected True"),
    ],
)
def test_errors_name_the_argument(args: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SRU(*args)
