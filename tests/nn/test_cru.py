"""CRU against the released code's lines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernelpose.nn import CRU


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in module.state_dict().items()}


def test_state_dict_is_that_of_the_released_code() -> None:
    """Also of uneven parts."""
    assert _shapes(CRU(64)) == {
        "squeeze1.weight": (16, 32, 1, 1),
        "squeeze2.weight": (16, 32, 1, 1),
        "GWC.weight": (64, 8, 3, 3),
        "GWC.bias": (64,),
        "PWC1.weight": (64, 16, 1, 1),
        "PWC2.weight": (48, 16, 1, 1),
    }
    assert _shapes(CRU(64, 0.25, 4, 4, 5)) == {
        "squeeze1.weight": (4, 16, 1, 1),
        "squeeze2.weight": (12, 48, 1, 1),
        "GWC.weight": (64, 1, 5, 5),
        "GWC.bias": (64,),
        "PWC1.weight": (64, 4, 1, 1),
        "PWC2.weight": (52, 12, 1, 1),
    }


@pytest.mark.parametrize("softmax", ["joint", "pairwise"])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.25, "squeeze_radio": 4}])
def test_written_out(options: dict[str, Any], softmax: str) -> None:
    """As the published lines, convolution by convolution; pairwise as the paper has it."""
    module = CRU(64, **options, softmax=softmax)
    for x in (torch.randn(2, 64, 5, 7), torch.randn(2, 5, 7, 64).permute(0, 3, 1, 2)):
        up, low = x.split([module.up_channel, 64 - module.up_channel], 1)
        up, low = F.conv2d(up, module.squeeze1.weight), F.conv2d(low, module.squeeze2.weight)
        first = F.conv2d(up, module.GWC.weight, module.GWC.bias, padding=1, groups=2)
        first = first + F.conv2d(up, module.PWC1.weight)
        second = torch.cat([F.conv2d(low, module.PWC2.weight), low], 1)
        means = torch.stack((first, second), 1).mean((3, 4), keepdim=True)
        if softmax == "joint":
            shares = means.flatten(1, 2).softmax(1).view_as(means)
        else:
            shares = means.softmax(1)
        expected = shares[:, 0] * first + shares[:, 1] * second
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((8, 0.1), r"alpha is 0\.1; expected two parts of the 8 channels"),
        ((8, 0.9), r"alpha is 0\.9; expected two parts of the 8 channels"),
        ((8, 0.5, 2, 2, 4), "group_kernel_size is 4; expected an odd number"),
    ],
)
def test_errors_name_the_argument(args: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CRU(*args)
