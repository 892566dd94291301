"""What a Folder keeps is that of the parameters there are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kernelpose.nn.folding import Folder, fold

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]


def made() -> Pair:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16).eval()
    for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        tensor.uniform_(0.5, 2)
    return conv, norm


def other() -> nn.Parameter:
    return nn.Parameter(torch.randn(16, 16, 3, 3))


def step(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    with torch.enable_grad():
        conv(torch.ones(1, 16, 4, 4)).sum().backward()
    torch.optim.SGD(conv.parameters(), lr=0.1).step()


def train(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    norm.train()(conv(torch.randn(2, 16, 8, 8)))
    norm.eval()


def assign(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    conv.load_state_dict({"weight": other(), "bias": torch.ones(16)}, assign=True)


def replace_twice(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """The second may lie where the one before the first lay."""
    for _ in range(2):
        conv.weight = other()


def set_data(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    conv.weight.data = other().data


def there_and_back(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    conv.half().float()


CHANGES: list[Callable[[nn.Conv2d, nn.BatchNorm2d], None]] = [
    step,
    train,
    assign,
    replace_twice,
    set_data,
    there_and_back,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_every_change_is_seen(change: Callable[[nn.Conv2d, nn.BatchNorm2d], None]) -> None:
    conv, norm = made()
    folder = Folder()
    for _ in range(10):
        before = folder([(conv, norm)])[0]
        change(conv, norm)
        found, expected = folder([(conv, norm)])[0], fold(conv, norm)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (
        change is there_and_back
        or not torch.equal(found[0], before[0])
        or not torch.equal(found[1], before[1])
    )


def test_nothing_is_made_twice_and_nothing_kept_with_a_gradient() -> None:
    calls: list[str] = []

    def function(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, ...]:
        calls.append("made")
        return fold(conv, norm)

    pair, folder = made(), Folder(function)
    with torch.no_grad():
        assert folder([pair])[0][0] is folder([pair])[0][0]
    with torch.inference_mode():
        folder([pair])
    assert len(calls) == 1
    assert folder([pair])[0][0].requires_grad
    assert len(calls) == 2


def test_a_copy_and_a_file_hold_nothing() -> None:
    pair, folder = made(), Folder()
    with torch.no_grad():
        folder([pair])
    size = len(pickle.dumps(Folder()))
    for again in (copy.deepcopy(folder), pickle.loads(pickle.dumps(folder))):
        assert len(pickle.dumps(again)) == size and again is not folder
    assert len(pickle.dumps(folder)) == size
