"""SRAttention beside what timm writes, in one call and layer by layer, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpose.nn import SRAttention
from tests.nn.inference import calls_of, check_deterministic, check_who_gets_it
from tests.parity import assert_parity

SIZE = (9, 7)


def tokens(channels: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, SIZE[0] * SIZE[1], channels, generator=generator)


@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize("batch", [0, 2])
def test_attention_of_other_widths(ratio: int, batch: int) -> None:
    torch.manual_seed(0)
    attn, x = SRAttention(24, num_heads=3, sr_ratio=ratio), tokens(24, batch)
    expected = layer_by_layer(attn, x, SIZE)
    torch.testing.assert_close(attn(x, SIZE), expected)


def test_attention_has_timms_parameters() -> None:
    names = {name.rpartition(".")[0] for name in SRAttention(16, 2, 4).state_dict()}
    assert names == {"q", "kv", "proj", "sr", "norm"}
    bare = set(SRAttention(16, 2, qkv_bias=False).state_dict())
    assert bare == {"q.weight", "kv.weight", "proj.weight", "proj.bias"}


# (batch, (h, w), C, heads, sr_ratio)
CASES = {
    "even": (2, (8, 6), 32, 2, 2),
    "leftover": (3, (9, 7), 48, 1, 2),
    "one-key": (1, (5, 4), 16, 1, 4),
    "no-reduction": (2, (5, 7), 96, 3, 1),
    "many-keys": (1, (24, 15), 64, 2, 2),
    "deep": (1, (16, 8), 80, 5, 8),
    "wide-heads": (1, (3, 4), 256, 2, 1),
    "many-images": (19, (6, 5), 32, 2, 2),
    "no-bias": (2, (8, 6), 64, 4, 2),
    "batch-0": (0, (8, 6), 32, 2, 2),
}


def layer_by_layer(attn: SRAttention, x: Tensor, size: tuple[int, int]) -> Tensor:
    reduced = x
    if attn.sr_ratio > 1:
        reduced = attn.norm(attn.sr(x.mT.unflatten(2, size)).flatten(2).mT)
    heads = attn.num_heads
    q = attn.q(x).unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = attn.kv(reduced).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v
    out: Tensor = attn.proj(mixed.transpose(1, 2).flatten(2))
    return out


def case(name: str) -> tuple[SRAttention, Tensor, tuple[int, int]]:
    batch, size, channels, heads, ratio = CASES[name]
    torch.manual_seed(0)
    attn = SRAttention(channels, heads, ratio, qkv_bias=name != "no-bias")
    for norm in attn.modules():
        if isinstance(norm, nn.LayerNorm):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias)
            norm.eps = 1e-3
    return attn, torch.randn(batch, size[0] * size[1], channels), size


calls = calls_of("sr_attention")


@pytest.mark.parametrize("name", CASES)
def test_parity(name: str, poisoned: None) -> None:
    attn, x, size = case(name)
    with torch.no_grad():
        eager = layer_by_layer(attn, x, size)
        exact = layer_by_layer(copy.deepcopy(attn).double(), x.double(), size)
        found, ran = calls(lambda: attn(x, size))
        assert ran == (x.numel() > 0)
        assert_parity(found, eager, exact)
        assert torch.equal(attn(F.pad(x, (1, 0))[..., 1:], size), found)


@pytest.mark.parametrize("name", ["even", "many-keys", "many-images", "one-key"])
def test_deterministic_whatever_the_threads(name: str) -> None:
    attn, x, size = case(name)
    check_deterministic(lambda: attn(x, size))


def test_who_gets_it() -> None:
    attn, x, size = case("even")
    check_who_gets_it(calls, 1, attn, x, size)
    with torch.no_grad():
        narrow = SRAttention(32, 4)
        assert calls(lambda: narrow(x, size))[1] == 0
        with pytest.raises(RuntimeError):
            attn(x, (8, 5))


def test_what_was_packed_goes_stale() -> None:
    attn, x, size = case("leftover")
    with torch.no_grad():
        before = attn(x, size)
        for name, parameter in attn.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
            after = attn(x, size)
            assert (after - before).abs().max() > 1e-3, name
            torch.testing.assert_close(after, layer_by_layer(attn, x, size), rtol=1e-4, atol=1e-4)
            before = after
        assert torch.equal(pickle.loads(pickle.dumps(attn))(x, size), after)
        assert torch.equal(copy.deepcopy(attn)(x, size), after)


@pytest.mark.parametrize("name", ["leftover", "no-reduction"])
def test_nan_reaches_what_it_reaches_layer_by_layer(name: str) -> None:
    attn, x, size = case(name)
    with torch.no_grad():
        for token in (0, size[0] * size[1] - 1):  # the last one is left over
            bad = x.clone()
            bad[1, token, 3] = torch.nan
            assert torch.equal(attn(bad, size).isnan(), layer_by_layer(attn, bad, size).isnan())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="num_heads is 3; expected a divisor of the 16 channels"):
        SRAttention(16, 3)
    with pytest.raises(ValueError, match="sr_ratio is 0; expected at least 1"):
        SRAttention(16, 2, 0)
