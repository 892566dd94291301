"""The MobileViT block: against timm, written out with its unfolding, odd maps, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernelpose
from kernelpose.nn import MobileViTBlock
from kernelpose.nn.mobilevit_block import VARIANTS


def shaken(module: nn.Module) -> nn.Module:
    """With statistics and affine parameters that are not those of a fresh norm, in eval mode."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.normal_(part.weight, 1.0, 0.3)
            nn.init.normal_(part.bias, std=0.3)
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    return module.eval()


def block(variant: str = "released") -> MobileViTBlock:
    torch.manual_seed(0)
    made = shaken(MobileViTBlock(8, 12, 16, 2, 32, variant=variant))
    assert isinstance(made, MobileViTBlock)
    return made


def maps(batch: int = 2, size: tuple[int, int] = (6, 8)) -> Tensor:
    return torch.randn(batch, 8, *size, generator=torch.Generator().manual_seed(1))


def test_timms_block(shared: Path) -> None:
    golden = torch.load(shared / "golden" / "mobilevit_block_timm.pt", weights_only=True)
    found = MobileViTBlock(24, 24, 32, 2, 64, variant="apple").eval()
    found.load_state_dict(golden["state_dict"])
    for (
        module
    ) in found.modules():  # recorded with the default of timm's block; its models have SiLU
        if hasattr(module, "act"):
            module.act = nn.ReLU()
    with torch.no_grad():
        torch.testing.assert_close(found(golden["input"]), golden["output"], rtol=1e-5, atol=1e-5)


def _conv(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    y = F.conv2d(x, conv.weight, None, 1, conv.padding)
    return F.silu(
        F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    )


def _norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), layer.weight, layer.bias, 1e-5)


def test_equations() -> None:
    """Spec 4a, with the unfolding."""
    found, x = block(), maps()
    y = x
    for part in found.local_representation:
        y = _conv(y, part.conv, part.norm_layer)
    b, d, h, w = y.shape
    t = y.reshape(b, d, h // 2, 2, w // 2, 2).permute(0, 3, 5, 2, 4, 1).reshape(b, 4, -1, d)
    for attention, mlp in found.transformer.layers:
        q, k, v = (_norm(t, attention.norm) @ attention.fn.to_qvk.weight.T).split(32, -1)
        t = t + (q @ k.mT * d**-0.5).softmax(-1) @ v @ attention.fn.w_out.weight.T
        fc1, fc2 = mlp.fn.net[0], mlp.fn.net[3]
        hidden = F.silu(F.linear(_norm(t, mlp.norm), fc1.weight, fc1.bias))
        t = t + F.linear(hidden, fc2.weight, fc2.bias)
    t = t.reshape(b, 2, 2, h // 2, w // 2, d).permute(0, 5, 3, 1, 4, 2).reshape(b, d, h, w)
    y = F.conv2d(t, found.fusion_block1.weight, found.fusion_block1.bias)
    last = found.fusion_block2
    expected = F.conv2d(torch.cat([x, y], 1), last.weight, last.bias, padding=1)
    torch.testing.assert_close(found(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_sees_its_group_alone(variant: str) -> None:
    """Through the transformer: tokens at the same place of each 2x2 patch."""
    tokens = torch.randn(1, 5 if variant == "released" else 6, 7, 16, requires_grad=True)
    layer = block(variant).transformer
    if variant == "released":
        y = layer(tokens)
    else:
        x, branch = layer[0](tokens, None)
        y = x + branch
    (gradient,) = torch.autograd.grad(y[0, 1, 2].sum(), tokens)
    seen = gradient[0].abs().sum(-1) > 0
    assert seen[1::2, 0::2].all()
    assert seen.sum() == seen[1::2, 0::2].numel()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns(variant: str) -> None:
    found = block(variant).train()
    found(maps()).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in found.parameters())


def test_dropout_acts_in_training_alone() -> None:
    found = block()
    assert torch.equal(found(maps()), found(maps()))
    for norm in (m for m in found.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 0.0
    found.train()
    assert not torch.equal(found(maps()), found(maps()))


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (6, 8)])
def test_released_runs_on_any_map(size: tuple[int, int]) -> None:
    found = block()
    with torch.no_grad(), kernelpose.backend("eager"):
        expected = found(maps(size=size))
    with torch.no_grad():
        torch.testing.assert_close(found(maps(size=size)), expected, rtol=1e-4, atol=1e-4)
    assert expected.shape == (2, 12, *size)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="variant is 'timm'; expected one of released, apple"):
        MobileViTBlock(8, 8, 16, 1, 32, variant="timm")
    with pytest.raises(ValueError, match=r"x has shape \(2, 8, 5, 8\); expected .* H and W even"):
        block("apple")(maps(size=(5, 8)))
