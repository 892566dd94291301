"""PVT v2 as a module: recorded outputs of timm's, sizes, training, tracing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernelpose
from kernelpose.models import PVTv2


def tiny(**options: Any) -> PVTv2:
    torch.manual_seed(0)
    defaults = {"embed_dims": (16, 32, 40, 64), "depths": (2, 1, 1, 1)}
    model = PVTv2(**{**defaults, **options}).eval()
    for name, parameter in model.named_parameters():
        if not ("norm" in name and name.endswith("weight")):
            nn.init.normal_(parameter, std=0.1)
    return model


def image(batch: int = 2, size: tuple[int, int] = (64, 48)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def test_timm(shared: Path) -> None:
    golden = torch.load(shared / "golden" / "pvtv2_mini_timm.pt", weights_only=True)
    model = PVTv2(**{k: v for k, v in golden["config"].items() if k != "num_classes"}).eval()
    model.load_state_dict(golden["state_dict"])
    with torch.no_grad():
        found = model(golden["input"])
    torch.testing.assert_close(found, golden["features"], rtol=1e-5, atol=1e-5)


# Parameters M, published with a classifier of 1000 classes.
@pytest.mark.parametrize(
    ("name", "published"), [("pvtv2-b0", 3.7), ("pvtv2-b1", 14.0), ("pvtv2-b2", 25.4)]
)
def test_sizes(name: str, published: float) -> None:
    with torch.device("meta"):
        model = kernelpose.create_model(name)
    classifier = 1001 * model.stages[3].norm.weight.shape[0] - 1
    parameters = sum(p.numel() for p in model.parameters())
    assert round((parameters + classifier) / 1e6, 1) == published
    rates = [block.drop_path.probability for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.1, len(rates)).tolist())


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (91, 67)])
def test_maps_of_any_image(size: tuple[int, int]) -> None:
    maps = tiny().maps(image(size=size))
    shapes = [
        (2, width, *(-(-side // stride) for side in size))
        for width, stride in zip((16, 32, 40, 64), (4, 8, 16, 32), strict=True)
    ]
    assert [tuple(m.shape) for m in maps] == shapes


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_eager_and_automatic_agree(batch: int) -> None:
    model, x = tiny(), image(batch)
    with torch.no_grad():
        found = model(x)
        with kernelpose.backend("eager"):
            expected = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_parameter_learns() -> None:
    model = tiny(drop_path=0.1).train()
    model(image(size=(64, 64))).square().mean().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_autocast() -> None:
    model, x = tiny(), image()
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x)
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1)}, r"depths is \(1, 1\); expected four positive numbers"),
        ({"sr_ratios": (8, 4, 2, 0)}, r"sr_ratios is \(8, 4, 2, 0\); expected"),
        ({"num_heads": (1, 2, 3, 8)}, "num_heads is 3; expected a divisor of the 40 channels"),
        ({"drop_path": 1.0}, "drop_path is 1.0; expected"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)
