"""Windowed multi-head self-attention over a token map, in plain PyTorch: what the op computes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def window_attention(
    qkv: Tensor,
    bias_table: Tensor | None,
    num_heads: int,
    window: tuple[int, int] | None = None,
    shift: tuple[int, int] = (0, 0),
    partition: str = "window",
    pooled: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention among the tokens of each group of the map; see `kernelpose.ops.window_attention`.

    qkv (B, H, W, 3C) -> (B, H, W, C). The map is padded, rolled, cut into groups, attended and put
    together again, as Swin's published code does it (arXiv 2103.14030), except that padding is
    never seen as a key.
    """
    height, width, channels3 = qkv.shape[1:]
    size = (height, width)
    window = window or size
    if partition == "grid":  # a patch larger than the map is the map
        window = (min(window[0], height), min(window[1], width))
    head_dim = channels3 // 3 // num_heads
    scale = head_dim**-0.5 if scale is None else scale

    groups = to_groups(qkv, window, shift, partition)  # (B, groups, tokens, 3C)
    q, k, v = groups.unflatten(-1, (3, num_heads, head_dim)).permute(3, 0, 1, 4, 2, 5)
    scores = scale * (q @ k.transpose(-2, -1))  # (B, groups, heads, tokens, tokens)
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    if bias_table is not None:
        scores = scores + _relative_bias(bias_table, size, window, partition).to(scores.dtype)
    ids = region_ids(size, window, shift, partition, qkv.device)  # (groups, tokens); -1: padding
    padded = bool((-size[0]) % window[0] or (-size[1]) % window[1])
    if padded or any(shift):
        visible = (ids[:, :, None] == ids[:, None, :]) & (ids[:, None, :] >= 0)
        scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
    if pooled:
        real = (ids >= 0).to(qkv.dtype)[:, None, :, None]
        k_mean, v_mean = (
            (x * real).sum(-2) / real.sum(-2) for x in (k, v)
        )  # (B, groups, heads, d)
        k_mean, v_mean = (x.transpose(1, 2)[:, None] for x in (k_mean, v_mean))
        scores = torch.cat([scores, scale * (q @ k_mean.transpose(-2, -1))], dim=-1)
        v = torch.cat([v, v_mean.expand(-1, groups.shape[1], -1, -1, -1)], dim=-2)
    attention = scores.softmax(-1).to(v.dtype)
    out = (attention @ v).transpose(2, 3).flatten(3)  # (B, groups, tokens, C)
    return from_groups(out, size, window, shift, partition)


def to_groups(x: Tensor, window: tuple[int, int], shift: tuple[int, int], partition: str) -> Tensor:
    """(B, H, W, C) -> (B, groups, tokens, C), padded at the bottom and right, then rolled."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % window[1], 0, -x.shape[1] % window[0]))
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    inner = window if partition == "window" else (x.shape[1] // window[0], x.shape[2] // window[1])
    if partition == "window":
        x = x.unflatten(2, (-1, inner[1])).unflatten(1, (-1, inner[0]))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    x = x.unflatten(2, (inner[1], -1)).unflatten(1, (inner[0], -1))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)


def from_groups(
    x: Tensor,
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    partition: str,
) -> Tensor:
    """Undo `to_groups`."""
    rows, columns = (math.ceil(s / w) for s, w in zip(size, window, strict=True))
    if partition == "window":
        x = x.unflatten(2, window).unflatten(1, (rows, columns)).transpose(2, 3)
    else:
        x = x.unflatten(2, (rows, columns)).unflatten(1, window).permute(0, 3, 1, 4, 2, 5)
    x = x.flatten(3, 4).flatten(1, 2)
    if any(shift):
        x = x.roll(shift, (1, 2))
    return x[:, : size[0], : size[1]]


def region_ids(
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    partition: str,
    device: torch.device,
) -> Tensor:
    """(groups, tokens): equal for tokens that are neighbours without the roll, -1 for padding."""
    wrapped = (torch.arange(n, device=device) < s for n, s in zip(size, shift, strict=True))
    row, column = (axis.long() for axis in wrapped)
    ids = 1 + 2 * row[:, None] + column  # 1..4, so that the zeros of the padding become -1
    return to_groups(ids[None, :, :, None], window, shift, partition)[0, :, :, 0] - 1


def _relative_bias(
    bias_table: Tensor, size: tuple[int, int], window: tuple[int, int], partition: str
) -> Tensor:
    """Table ((2h-1)(2w-1), heads) -> (heads, tokens, tokens) for groups of h x w tokens."""
    h, w = window
    if partition == "grid":
        h, w = (math.ceil(s / p) for s, p in zip(size, window, strict=True))
    tokens = torch.arange(h * w, device=bias_table.device)
    y, x = tokens // w, tokens % w
    index = (y[:, None] - y + h - 1) * (2 * w - 1) + x[:, None] - x + w - 1
    return bias_table[index].permute(2, 0, 1)
