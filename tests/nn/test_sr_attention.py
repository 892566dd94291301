"""SRAttention and MixFFN beside what timm writes, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kernelpose
from kernelpose import ops
from kernelpose.backend import why_not
from kernelpose.nn import MixFFN, SRAttention, mix_ffn

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


@pytest.mark.parametrize("batch", [0, 2])
def test_mix_ffn(batch: int) -> None:
    torch.manual_seed(0)
    mlp, x = MixFFN(8, 24, 12), tokens(8, batch)
    maps = mlp.dwconv(mlp.fc1(x).mT.unflatten(2, SIZE))
    expected = mlp.fc2(F.gelu(maps.flatten(2).mT))
    assert expected.shape == (batch, 63, 12)
    torch.testing.assert_close(mlp(x, SIZE), expected)
    assert set(mlp.state_dict()) == {
        f"{layer}.{leaf}" for layer in ("fc1", "dwconv", "fc2") for leaf in ("weight", "bias")
    }


@pytest.mark.parametrize("rows", [1, 2, 4, 9])
def test_mix_ffn_in_strips(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if why_not("dwconv_gelu", "cpu", tokens(8)):
        pytest.skip("strips are for the native core")
    torch.manual_seed(0)
    mlp, x = MixFFN(8, 24, 12), tokens(16)[..., ::2]
    expected = mlp(x, SIZE)  # at once, as parameters ask for gradients
    monkeypatch.setattr(mix_ffn, "_STRIP_BYTES", rows * SIZE[1] * 24 * 4)
    sizes = []
    original = ops.dwconv_gelu

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        sizes.append(options["size"])
        return original(*args, **options)

    monkeypatch.setattr(ops, "dwconv_gelu", watched)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x, SIZE), expected)
        strips = -(-SIZE[0] // rows)
        assert len(sizes) == 2 * strips
        assert max(height for height, _ in sizes) <= rows + 2
        sizes.clear()
        with kernelpose.backend("eager"):
            torch.testing.assert_close(mlp(x, SIZE), expected)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(mlp(x, SIZE).float(), expected, rtol=0.1, atol=0.02)
        assert sizes == [SIZE] * 2


def test_refusals() -> None:
    with pytest.raises(ValueError, match="num_heads is 3; expected a divisor of the 16 channels"):
        SRAttention(16, 3)
    with pytest.raises(ValueError, match="sr_ratio is 0; expected at least 1"):
        SRAttention(16, 2, 0)
