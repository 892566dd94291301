"""Groups of channels in a cascade, each attending to a reduced map: what the op computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelpose.reference.reduced_attention import reduced_attention


def cascaded_attention(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    kv_weight: Tensor,
    kv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    num_heads: int,
    eps: float,
) -> Tensor:
    """HEViTPose's attention (arXiv 2311.13615), but for its last projection, in plain PyTorch; see
    `kernelpose.ops.cascaded_attention`.
    """
    groups, width = q_bias.shape
    size, ratio = x.shape[1:3], reduce_weight.shape[-1]
    reducers = zip(reduce_weight.chunk(groups), reduce_bias.chunk(groups), strict=True)
    found: list[Tensor] = []
    for i, (part, reducer) in enumerate(zip(x.chunk(groups, -1), reducers, strict=True)):
        u = part + found[-1] if found else part
        reduced = F.conv2d(u.permute(0, 3, 1, 2), *reducer, stride=ratio, groups=width)
        queries, keys = (
            F.layer_norm(tokens, (width,), eps=eps)
            for tokens in (u.flatten(1, 2), reduced.flatten(2).transpose(1, 2))
        )
        q = F.linear(queries, q_weight[i], q_bias[i])
        kv = F.linear(keys, kv_weight[i], kv_bias[i])
        y = F.linear(reduced_attention(q, kv, num_heads), out_weight[i], out_bias[i])
        found.append(
            F.layer_norm(y, (width,), norm_weight[i], norm_bias[i], eps).unflatten(1, size)
        )
    return torch.cat(found, -1)
