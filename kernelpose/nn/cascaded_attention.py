"""The attention of HEViTPose: groups of channels in a cascade, keys and values of a reduced map."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpose import ops
from kernelpose.nn.add_layer_norm import AddLayerNorm
from kernelpose.nn.conv_norm import ConvNorm
from kernelpose.nn.folding import Folder, bias_of, fold_affine
from kernelpose.nn.packed_cascade import PackedCascade
from kernelpose.nn.untouched import has_geometry, unhooked, untouched


class CascadedGroupSRAttention(nn.Module):
    """Cascaded group spatial-reduction attention: maps (B, C, H, W) -> maps of the same shape.

    The channels are cut into groups of d. Each group adds what the one before it found to its own
    channels, U_i = X_i + O_(i-1), and attends from every place of U_i to a map S_i that a depthwise
    convolution of kernel and stride `sr_ratio` makes of it (48 or 64 places in HEViTPose):

        O_i = LN_o(W_o MHSA(Q = W_q LN_q(U_i), K = W_k LN_k(S_i), V = W_v LN_v(S_i)))

    and the result is BN(W [O_1; O_2; ...]) ("HEViTPose", arXiv 2311.13615, CGSR-MHA; that the
    reduction is depthwise, and the BatchNorm, are our choice). LN_k and LN_v normalise one map, so
    that is done once, and what differs between them is folded into W_k and W_v, which is exact.

    What stands before the last projection is `kernelpose.ops.cascaded_attention`; where a gradient
    is wanted, or a layer is not `untouched`, the layers one by one. Maps in channels_last memory
    are never transposed, and the result is in it. Under `kernelpose.backend("eager")` plain PyTorch
    computes the same.

    Args:
        dim: C.
        num_groups: a divisor of dim.
        num_heads: of each group, a divisor of d = dim / num_groups.
        sr_ratio: reduction of both sides, which it must divide.

    Raises:
        ValueError: an argument, or in forward a shape, does not fit.
    """

    def __init__(
        self, dim: int, num_groups: int = 4, num_heads: int = 2, sr_ratio: int = 1
    ) -> None:
        super().__init__()
        if num_groups < 1 or dim % num_groups:
            raise ValueError(
                f"num_groups is {num_groups}; expected a divisor of the {dim} channels."
            )
        width = dim // num_groups
        if num_heads < 1 or width % num_heads:
            raise ValueError(
                f"num_heads is {num_heads}; expected a divisor of the {width} channels of a group."
            )
        if sr_ratio < 1:
            raise ValueError(f"sr_ratio is {sr_ratio}; expected at least 1.")
        self.dim = dim
        self.sr_ratio = sr_ratio
        self.groups = nn.ModuleList(_Group(width, num_heads, sr_ratio) for _ in range(num_groups))
        self.proj = ConvNorm(dim, dim)
        self._folder = Folder(_stacked)
        self._packed = PackedCascade()

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """residual: (B, C, H, W), added to the result."""
        if x.dim() != 4 or x.shape[1] != self.dim or any(s % self.sr_ratio for s in x.shape[2:]):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected (B, {self.dim}, H, W), H and W multiples "
                f"of {self.sr_ratio}."
            )
        tokens = x.permute(0, 2, 3, 1)
        groups = cast("list[_Group]", list(self.groups))
        layers: list[Any] = [group._modules[name] for group in groups for name in _NAMES]
        wants_gradient = torch.is_grad_enabled() and (
            x.requires_grad or any(weight.requires_grad for weight in self.groups.parameters())
        )
        if wants_gradient or not (unhooked(*groups) and self._is_one_op(layers)):
            found: list[Tensor] = []
            for group, part in zip(groups, tokens.chunk(len(groups), -1), strict=True):
                found.append(group(part, found[-1] if found else None))
            joined = torch.cat(found, -1)
        else:
            (weights,) = self._folder([layers])
            sizes = groups[0].num_heads, layers[1].eps
            whole = self._packed(x, residual, weights, *sizes, self.proj)
            if whole is not None:
                return whole
            joined = ops.cascaded_attention(tokens, *weights, num_heads=sizes[0], eps=sizes[1])
        y: Tensor = self.proj(joined.permute(0, 3, 1, 2), residual=residual)
        return y

    def _is_one_op(self, layers: list[Any]) -> bool:
        """Whether the layers of all groups are what `kernelpose.ops.cascaded_attention` takes."""
        ratio = self.sr_ratio
        return (
            untouched(*layers)
            and all(has_geometry(sr, ratio, stride=ratio) for sr in layers[:: len(_NAMES)])
            and len({layer.eps for layer in layers if isinstance(layer, nn.LayerNorm)}) == 1
        )


_NAMES = ("sr", "norm_q", "q", "norm_k", "k", "norm_v", "v", "proj", "norm")  # of a group's layers


class _Group(nn.Module):
    """One group: its channels (B, H, W, d), what the one before found -> what it finds."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, groups=dim)
        self.norm_q, self.q = AddLayerNorm(dim), nn.Linear(dim, dim)
        self.norm_k, self.k = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.norm_v, self.v = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, before: Tensor | None) -> Tensor:
        size = x.shape[1:3]
        u, normed = self.norm_q(x.contiguous(), before)
        reduced = self.sr(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        layers = (self.norm_k, self.k, self.norm_v, self.v)
        if untouched(*layers):
            reduced = F.layer_norm(reduced, reduced.shape[2:], eps=self.norm_k.eps)
            kv = F.linear(reduced, *_keys_and_values(*layers))
        else:
            kv = torch.cat((self.k(self.norm_k(reduced)), self.v(self.norm_v(reduced))), -1)
        q = self.q(normed.flatten(1, 2))
        y = self.proj(ops.reduced_attention(q, kv, num_heads=self.num_heads))
        found: Tensor = self.norm(y).unflatten(1, size)
        return found


def _keys_and_values(
    norm_k: nn.LayerNorm, k: nn.Linear, norm_v: nn.LayerNorm, v: nn.Linear
) -> tuple[Tensor, Tensor]:
    """Weight and bias of one linear from a normalised map to keys and values."""
    keys, values = fold_affine(norm_k, k), fold_affine(norm_v, v)
    return torch.cat((keys[0], values[0])), torch.cat((keys[1], values[1]))


def _stacked(*layers: Any) -> tuple[Tensor, ...]:
    """The parameters of `kernelpose.ops.cascaded_attention` from the layers of all groups."""
    groups = []
    for first in range(0, len(layers), len(_NAMES)):
        sr, norm_q, q, norm_k, k, norm_v, v, proj, norm = layers[first : first + len(_NAMES)]
        pairs = (
            fold_affine(norm_q, q),
            _keys_and_values(norm_k, k, norm_v, v),
            *((layer.weight, bias_of(layer)) for layer in (proj, norm)),
        )
        groups.append([sr.weight, bias_of(sr), *(tensor for pair in pairs for tensor in pair)])
    reduce_weight, reduce_bias, *others = zip(*groups, strict=True)
    return torch.cat(reduce_weight), torch.cat(reduce_bias), *map(torch.stack, others)
