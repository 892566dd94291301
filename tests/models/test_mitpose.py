"""MiTPOSE as a module: both layouts written out, names, sizes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernelpose
from kernelpose.models import MiTPOSE, ViTPose
from kernelpose.models.counting import count

LAYOUTS = ("figure", "released")


def tiny(**options: Any) -> MiTPOSE:
    torch.manual_seed(0)
    defaults = {"embed_dim": 32, "depth": 2, "num_heads": 2, "image_size": (64, 48)}
    model = MiTPOSE(**{**defaults, **options}).eval()
    for name, parameter in model.named_parameters():
        if not re.search(r"norm|ln\d|\.gn\.", name):
            nn.init.normal_(parameter, std=0.2)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):  # SRU divides by the sum of its weights
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def image(batch: int = 2, size: tuple[int, int] = (64, 48)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


# name: parameters M with the simple and the classic decoder, all G; the specification rounds the
# last to 30.0, 87.1 and (twice) 170.9
RELEASED = {
    "mitpose-b-released": (151.34, 155.4, 30.00),
    "mitpose-l-released": (442.60, 447.7, 87.10),
    "mitpose-h-released": (872.29, 878.4, 170.85),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_costs_what_the_specification_counts(name: str) -> None:
    simple, classic, every = RELEASED[name]
    with torch.device("meta"):
        counted = count(kernelpose.create_model(name))
        larger = kernelpose.create_model(name, decoder="classic")
    assert round(counted.parameters / 1e6, 2) == simple
    assert round(sum(p.numel() for p in larger.parameters()) / 1e6, 1) == classic
    assert round(counted.all / 1e9, 2) == every


def _norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def _attention(x: Tensor, attn: nn.Module) -> Tensor:
    q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return attn.proj(mixed.transpose(1, 2).flatten(2))


def _scconv(x: Tensor, layer: nn.Module) -> Tensor:
    """SRU, then CRU (specs 2.3), of a map."""
    gn, cru = layer.SRU.gn, layer.CRU
    y = F.group_norm(x, 4, gn.weight, gn.bias, 1e-5)
    gate = torch.sigmoid((gn.weight / gn.weight.sum()).view(1, -1, 1, 1) * y)
    a1, a2 = torch.where(gate > 0.5, x, gate * x).chunk(2, 1)
    b1, b2 = torch.where(gate > 0.5, 0.0, gate * x).chunk(2, 1)
    up, low = torch.cat([a1 + b2, a2 + b1], 1).chunk(2, 1)
    up, low = F.conv2d(up, cru.squeeze1.weight), F.conv2d(low, cru.squeeze2.weight)
    y1 = F.conv2d(up, cru.GWC.weight, cru.GWC.bias, padding=1, groups=2)
    y1 = y1 + F.conv2d(up, cru.PWC1.weight)
    y2 = torch.cat([F.conv2d(low, cru.PWC2.weight), low], 1)
    both = torch.cat([y1, y2], 1)
    beta1, beta2 = both.mean((2, 3), keepdim=True).softmax(1).chunk(2, 1)
    return beta1 * y1 + beta2 * y2


def _gates(y: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    pooled = (y.mean((2, 3), keepdim=True), y.amax((2, 3), keepdim=True))
    mean, largest = (
        F.conv2d(F.relu(F.conv2d(p, layer.CA.fc1.weight)), layer.CA.fc2.weight) for p in pooled
    )
    flat = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
    return torch.sigmoid(mean + largest), torch.sigmoid(
        F.conv2d(flat, layer.SA.conv1.weight, padding=3)
    )


def test_equations_of_the_figure() -> None:
    model = tiny()
    encoder, x = model.backbone, image()
    y = encoder.patch_embed(x).permute(0, 3, 1, 2)
    refined = _scconv(y, encoder.refine)
    grn = encoder.refine.GRN
    energy = refined.square().sum((2, 3), keepdim=True).sqrt()
    share = energy / (energy.mean(1, keepdim=True) + 1e-6)
    gamma, beta = grn.gamma.view(1, -1, 1, 1), grn.beta.view(1, -1, 1, 1)
    y = y + gamma * refined * share + beta + refined
    tokens = y.flatten(2).mT + encoder.pos_embed[:, 1:] + encoder.pos_embed[:, :1]
    for block in encoder.blocks:
        tokens = tokens + _attention(_norm(tokens, block.norm1), block.attn)
        z, local = _norm(tokens, block.norm1).mT.unflatten(2, (4, 3)), block.local
        parts = [
            F.conv2d(z, conv.weight, conv.bias, padding=conv.kernel_size[0] // 2, groups=32)
            for conv in (local.conv_7x7, local.conv_5x5, local.conv_3x3)
        ]
        joined = torch.stack([p.unflatten(1, (16, 2)) for p in parts], 2).flatten(1, 3)
        mix = local.conv_1x1_final1
        mixed = F.conv2d(joined, mix.weight, mix.bias, groups=16) + z
        channel, spatial = _gates(mixed, local)
        tokens = tokens + ((channel + spatial) * mixed).flatten(2).mT
        hidden = F.gelu(block.mlp.fc1(_norm(tokens, block.norm2)))
        tokens = tokens + block.mlp.fc2(hidden)
    expected = _norm(tokens, encoder.last_norm).mT.unflatten(2, (4, 3))
    torch.testing.assert_close(encoder(x), expected, rtol=1e-3, atol=1e-4)


def test_equations_of_the_released_code() -> None:
    model = tiny(layout="released")
    encoder, x = model.backbone, image()
    y = F.conv2d(
        x, encoder.patch_embed.projection.weight, encoder.patch_embed.projection.bias,
        stride=16, padding=2,
    )  # fmt: skip
    dense = encoder.module
    first = dense.conv_1x1_init(y)
    parts = [conv(first) for conv in (dense.conv_7x7, dense.conv_5x5, dense.conv_3x3)]
    y = dense.conv_1x1_final1(torch.cat(parts, 1)) + y
    channel, spatial = _gates(y, dense)
    y = dense.conv_1x1_final2(torch.cat([channel * y, spatial * y], 1)) + y
    tokens = y.flatten(2).mT + encoder.pos_embed
    for layer in encoder.layers:
        tokens = tokens + _attention(_norm(tokens, layer.ln1), layer.attn)
        z = _norm(tokens, layer.ln1).mT.unflatten(2, (4, 3))
        tokens = tokens + _scconv(z, layer.scc).flatten(2).mT
        fc1, fc2 = layer.ffn.layers[0][0], layer.ffn.layers[1]
        tokens = tokens + fc2(F.gelu(fc1(_norm(tokens, layer.ln2))))
    expected = _norm(tokens, encoder.ln1).mT.unflatten(2, (4, 3))
    with torch.no_grad():  # folded
        torch.testing.assert_close(encoder(x), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(encoder(x), expected, rtol=1e-3, atol=1e-4)


def test_names_of_the_released_backbone() -> None:
    """As field notes of the released code list them."""
    names = {
        re.sub(r"^layers\.\d+", "layers.#", n)
        for n in tiny(layout="released").backbone.state_dict()
    }
    pair = ("weight", "bias")
    expected = {"pos_embed"}
    for module in (
        "patch_embed.projection", "module.conv_1x1_init", "module.conv_7x7", "module.conv_5x5",
        "module.conv_3x3", "module.conv_1x1_final1", "module.conv_1x1_final2", "layers.#.ln1",
        "layers.#.attn.qkv", "layers.#.attn.proj", "layers.#.ln2", "layers.#.scc.SRU.gn",
        "layers.#.scc.CRU.GWC", "layers.#.ffn.layers.0.0", "layers.#.ffn.layers.1", "ln1",
    ):  # fmt: skip
        expected |= {f"{module}.{leaf}" for leaf in pair}
    for module in (
        "module.CA.fc1", "module.CA.fc2", "module.SA.conv1", "layers.#.scc.CRU.squeeze1",
        "layers.#.scc.CRU.squeeze2", "layers.#.scc.CRU.PWC1", "layers.#.scc.CRU.PWC2",
    ):  # fmt: skip
        expected.add(f"{module}.weight")
    assert names == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(64, 48), (48, 80), (128, 96)])
def test_heatmaps_are_a_quarter_of_any_image(layout: str, size: tuple[int, int]) -> None:
    model = tiny(layout=layout, num_keypoints=5)
    assert model(image(size=size)).shape == (2, 5, size[0] // 4, size[1] // 4)
    assert model.heatmap_size == (16, 12)


def test_weights_of_vitpose_load_into_the_rest() -> None:
    torch.manual_seed(1)
    vit = ViTPose(embed_dim=32, depth=2, num_heads=2, image_size=(64, 48), decoder="simple")
    model = tiny()
    report = kernelpose.load_checkpoint(model, vit.state_dict())
    assert report.left_over == ()
    assert all(".local." in name or ".refine." in name for name in report.missing)
    assert torch.equal(
        model.backbone.blocks[1].mlp.fc1.weight, vit.backbone.blocks[1].mlp.fc1.weight
    )


def test_a_released_checkpoint_loads_with_its_decoder() -> None:
    """Named as mmpose 1.x names a model around this backbone."""
    model, other = tiny(layout="released"), tiny(layout="released", num_keypoints=17)
    saved = {name.replace("keypoint_head.", "head."): t for name, t in model.state_dict().items()}
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    report = kernelpose.load_checkpoint(other, {"state_dict": saved})
    assert (report.layout, report.missing, report.left_over) == ("mmpose1", (), ())
    with torch.no_grad():
        assert torch.equal(other(image()), model(image()))


def test_freezing() -> None:
    model = tiny()
    model.freeze("attention", "mlp")
    left = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert left
    assert all(n.startswith(("refine.", "last_norm.")) or ".local." in n for n in left)
    model.freeze("encoder")
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert all(p.requires_grad for p in model.keypoint_head.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "paper"}, "layout is 'paper'; expected figure or released"),
        ({"depth": 0}, "depth is 0; expected at least 1"),
        ({"image_size": (8, 8)}, r"image_size is \(8, 8\); expected"),
        ({"drop_path": 1.0}, "drop_path is 1.0; expected"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)
