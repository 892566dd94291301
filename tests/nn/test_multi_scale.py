"""MultiScaleModule: the released module's results, its folded form, and when that is used."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernelpose.nn import MultiScaleModule


@pytest.fixture
def module() -> MultiScaleModule:
    torch.manual_seed(0)
    return MultiScaleModule(32, 32).eval()


@pytest.fixture
def golden(shared: Path) -> Iterator[dict[str, Tensor]]:
    yield torch.load(shared / "golden" / "mitpose_modules_released.pt", weights_only=True)[
        "multiscale"
    ]


def _maps(height: int = 16, width: int = 12) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 32, height, width)


def test_golden_module_of_the_released_code(golden: dict[str, Tensor]) -> None:
    module = MultiScaleModule(32, 32).eval()
    module.load_state_dict(golden["state_dict"])
    torch.testing.assert_close(module(golden["input"]), golden["output"], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert not module._folder._made
        torch.testing.assert_close(module(golden["input"]), golden["output"], atol=1e-5, rtol=1e-5)
        assert module._folder._made


@pytest.mark.parametrize("size", [(16, 12), (5, 9), (2, 3), (1, 1)])
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_folded_equals_the_layers(
    module: MultiScaleModule, size: tuple[int, int], guard: type[torch.no_grad]
) -> None:
    x = _maps(*size)
    expected = module(x)
    with guard():
        torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
    assert module._folder._made


def test_fold_is_what_it_says(module: MultiScaleModule) -> None:
    x = _maps()
    weight, bias = module.fold()
    assert weight.shape == (32, 32, 7, 7) and bias.shape == (32, 16, 12)
    first = module.conv_1x1_init(x)
    branches = (module.conv_7x7(first), module.conv_5x5(first), module.conv_3x3(first))
    expected = module.conv_1x1_final1(torch.cat(branches, 1)) + x
    got = torch.nn.functional.conv2d(x, weight, padding=3) + bias + x
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    # At the border the first convolution's bias is missing from what the kernels read.
    assert (bias[:, 8, 6] - bias[:, 0, 0]).abs().max() > 1e-3


def test_tokens_are_a_map(module: MultiScaleModule) -> None:
    x = _maps()
    tokens = x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(module(tokens), module(x).flatten(2).transpose(1, 2))
    other = MultiScaleModule(32, 32, map_size=(4, 6))
    assert other(tokens[:, :24]).shape == (2, 24, 32)
    with pytest.raises(ValueError, match=r"x has shape \(2, 24, 32\); expected \(B, 192, C\)"):
        module(tokens[:, :24])


def test_what_is_folded_follows_the_parameters(module: MultiScaleModule) -> None:
    x = _maps()
    with torch.no_grad():
        before = module(x)
        module.conv_5x5.weight.mul_(2)
        changed = module(x)
    assert (changed - before).abs().max() > 1e-3
    torch.testing.assert_close(changed, module(x).detach(), atol=1e-5, rtol=1e-5)
    other = MultiScaleModule(32, 32)
    module.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(module(x), other.eval()(x))


def test_training_and_gradients_use_the_layers(module: MultiScaleModule) -> None:
    x = _maps()
    module(x).sum().backward()
    assert module.conv_1x1_init.bias.grad is not None
    with torch.no_grad():
        module.train()(x)
    assert not module._folder._made


def test_copies_do_not_carry_what_is_folded(module: MultiScaleModule) -> None:
    with torch.no_grad():
        expected = module(_maps())
        twin = copy.deepcopy(module)
        assert not twin._folder._made and set(twin.state_dict()) == set(module.state_dict())
        assert torch.equal(twin(_maps()), expected)


def test_half_types(module: MultiScaleModule) -> None:
    module.bfloat16()
    x = _maps().bfloat16()
    exact = copy.deepcopy(module).double()(x.double())
    with torch.no_grad():
        folded = module(x)
    assert folded.dtype == torch.bfloat16
    error, layers = ((y - exact).abs().max() for y in (folded, module(x)))
    assert error <= 2 * layers
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module.float()(_maps())  # folds within autocast
        weight = module._folder._made[0][0]
        assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, copy.deepcopy(module).fold()[0])


def test_compiles_and_exports(module: MultiScaleModule) -> None:
    x = _maps()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(compiled, module(x), atol=1e-5, rtol=1e-5)
        program = torch.export.export(module, (x,))
        torch.testing.assert_close(program.module()(x), compiled)


def test_channels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="out_channels is 16; expected 32, as in_channels"):
        MultiScaleModule(32, 16)
    with pytest.raises(ValueError, match="ratio is 16; expected no more than the 8 channels"):
        MultiScaleModule(8, 8)
