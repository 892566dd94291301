"""SRAttention beside what timm writes, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from kernelpose.nn import SRAttention

SIZE = (9, 7)


def tokens(channels: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, SIZE[0] * SIZE[1], channels, generator=generator)


@pytest.mark.parametrize(("ratio", "keys"), [(1, 63), (2, 12), (4, 2)])
@pytest.mark.parametrize("batch", [0, 2])
def test_attention(ratio: int, keys: int, batch: int) -> None:
    torch.manual_seed(0)
    attn, x = SRAttention(24, num_heads=3, sr_ratio=ratio), tokens(24, batch)
    reduced = x
    if ratio > 1:
        maps = attn.sr(x.mT.unflatten(2, SIZE))
        reduced = attn.norm(maps.flatten(2).mT)
    assert reduced.shape == (batch, keys, 24)
    q = attn.q(x).view(batch, 63, 3, 8).transpose(1, 2)
    k, v = attn.kv(reduced).view(batch, keys, 2, 3, 8).permute(2, 0, 3, 1, 4)
    mixed = ((q @ k.mT) * 8**-0.5).softmax(-1) @ v
    expected = attn.proj(mixed.transpose(1, 2).reshape(batch, 63, 24))
    torch.testing.assert_close(attn(x, SIZE), expected)


def test_attention_has_timms_parameters() -> None:
    names = {name.rpartition(".")[0] for name in SRAttention(16, 2, 4).state_dict()}
    assert names == {"q", "kv", "proj", "sr", "norm"}
    bare = set(SRAttention(16, 2, qkv_bias=False).state_dict())
    assert bare == {"q.weight", "kv.weight", "proj.weight", "proj.bias"}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="num_heads is 3; expected a divisor of the 16 channels"):
        SRAttention(16, 3)
    with pytest.raises(ValueError, match="sr_ratio is 0; expected at least 1"):
        SRAttention(16, 2, 0)
