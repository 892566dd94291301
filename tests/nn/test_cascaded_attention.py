"""CascadedGroupSRAttention: its equations, backends, gradients, tracing, refusals."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernelpose
from kernelpose import ops
from kernelpose.nn import CascadedGroupSRAttention


def made(dtype: torch.dtype = torch.float32, **options: Any) -> CascadedGroupSRAttention:
    torch.manual_seed(0)
    sizes = {"dim": 24, "num_groups": 3, "num_heads": 2, "sr_ratio": 2}
    module = CascadedGroupSRAttention(**{**sizes, **options})
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.2, 1.0)
            tensor.detach().mul_(torch.where(torch.rand_like(tensor) < 0.5, -1.0, 1.0))
    nn.init.uniform_(module.proj.norm.running_var, 0.5, 2.0)
    return module.to(dtype).eval()


def maps(batch: int = 2, size: tuple[int, int] = (8, 6), channels: int = 24) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def _tokens(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x.flatten(2).mT, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def twin(x: Tensor, module: CascadedGroupSRAttention) -> Tensor:
    """Spec 3a, step by step."""
    found: list[Tensor] = []
    for part, g in zip(x.chunk(len(module.groups), 1), module.groups, strict=True):
        u = part + found[-1] if found else part
        s = F.conv2d(u, g.sr.weight, g.sr.bias, stride=module.sr_ratio, groups=u.shape[1])
        q, k, v = (
            layer(_tokens(y, norm)).unflatten(2, (g.num_heads, -1)).transpose(1, 2)
            for y, norm, layer in ((u, g.norm_q, g.q), (s, g.norm_k, g.k), (s, g.norm_v, g.v))
        )
        mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        y = g.proj(mixed.transpose(1, 2).flatten(2)).mT.unflatten(2, x.shape[2:])
        found.append(_tokens(y, g.norm).mT.unflatten(2, x.shape[2:]))
    y, norm = F.conv2d(torch.cat(found, 1), module.proj.conv.weight), module.proj.norm
    return F.batch_norm(
        y, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, 0.0, norm.eps
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_groups": 1, "sr_ratio": 1}, {"num_groups": 4, "num_heads": 3}]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_equations_and_their_gradients(
    options: dict[str, int], channels_last: bool, training: bool
) -> None:
    module = made(torch.float64, **options).train(training)
    x = maps().double()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    expected = twin(x, module)
    found = module(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    inputs = (x, *module.parameters())
    weights = maps(channels=24).double()
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        rtol=1e-7,
        atol=1e-7,
    )
    if not training:
        with torch.no_grad():  # what is folded is kept
            torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)
            nn.init.zeros_(module.groups[0].norm_k.bias)
            torch.testing.assert_close(module(x), twin(x, module), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("size", [(2, 2), (8, 6), (16, 12)])
def test_eager_and_automatic_agree(batch: int, size: tuple[int, int]) -> None:
    module, x = made(), maps(batch, size)
    with torch.no_grad():
        found = module(x)
        with kernelpose.backend("eager"):
            expected = module(x)
    assert found.shape == x.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_op_runs_where_no_gradient_is_wanted() -> None:
    module, x = made(), maps()
    with mock.patch.object(ops, "cascaded_attention", wraps=ops.cascaded_attention) as op:
        trained = module(x)
        assert not op.called and trained.requires_grad
        with torch.no_grad():
            inferred = module(x)
        assert op.call_count == 1
        frozen = module.requires_grad_(False)(x)
        assert op.call_count == 2 and torch.equal(frozen, inferred)
        assert module(x.requires_grad_()).requires_grad and op.call_count == 2
    torch.testing.assert_close(inferred, trained, rtol=1e-4, atol=1e-4)


def test_maps_in_channels_last_memory_stay_so() -> None:
    with torch.no_grad():
        y = made()(maps().contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    module, x = made(), maps()
    with torch.no_grad():
        expected = module(x)
        half = copy.deepcopy(module).to(dtype)(x.to(dtype))
        with torch.autocast("cpu", dtype):
            mixed = module(x)
    for found in (half, mixed):
        assert found.dtype == dtype
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 5}, "num_groups is 5; expected a divisor of the 24 channels"),
        ({"num_heads": 3}, "num_heads is 3; expected a divisor of the 8 channels of a group"),
        ({"sr_ratio": 0}, "sr_ratio is 0; expected at least 1"),
    ],
)
def test_refused_arguments(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options)


@pytest.mark.parametrize(
    "x", [maps(size=(8, 7)), maps(channels=16), maps()[0]], ids=["side", "channels", "dimensions"]
)
def test_refused_maps(x: Tensor) -> None:
    message = r"x has shape .*; expected \(B, 24, H, W\), H and W multiples of 2\."
    with pytest.raises(ValueError, match=message):
        made()(x)
