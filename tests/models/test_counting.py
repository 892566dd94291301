"""Counted parameters and multiply-accumulates against the specification, to its printed digits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kernelpose.models import create_model
from kernelpose.models.counting import count


def million(n: int) -> float:
    return round(n / 1e6, 3)


def billion(n: int) -> float:
    return round(n / 1e9, 3)


# name: decoder: parameters M, layers G, hooked G (None where the specification prints none), all G
MODELS = {
    ("vitpose-s", "classic"): (24.291, 5.254, 5.269, 5.594),
    ("vitpose-b", "classic"): (89.995, 17.843, 17.870, 18.523),
    ("vitpose-l", "classic"): (308.545, 59.757, 59.822, 61.569),
    ("vitpose-h", "classic"): (637.209, 122.810, 122.916, 125.830),
    ("vitpose-s", "simple"): (21.723, 4.314, None, 4.654),
    ("vitpose-b", "simple"): (85.912, 16.782, None, 17.461),
    ("vitpose-l", "simple"): (303.453, 58.614, None, 60.426),
    ("vitpose-h", "simple"): (631.108, 121.586, None, 124.606),
}
# (name, input): the same
OF_INPUTS = {
    ("mitpose-b", (256, 192)): (90.000, 17.391, 17.425, 18.070),
    ("mitpose-l", (256, 192)): (315.364, 60.284, 60.375, 62.096),
    ("mitpose-h", (256, 192)): (654.035, 124.710, 124.862, 127.730),
    ("hrpvt-l", (256, 192)): (25.198, 5.584, 5.635, 5.721),
    ("hrpvt-l", (384, 288)): (25.301, 12.566, 12.680, 13.259),
    ("hrpvt-m", (256, 192)): (21.025, 4.547, 4.579, 4.620),
    ("hrpvt-s", (256, 192)): (5.349, 1.302, 1.320, 1.339),
    ("mobilevitpose-s", (256, 256)): (9.718, 3.249, 3.284, 3.287),
    ("mobilevitpose-s", (256, 192)): (9.718, 2.437, 2.463, 2.458),
    ("mobilevitpose-xxs", (256, 256)): (4.424, 1.769, 1.783, 1.807),
    ("mobilevitpose-xxs", (256, 192)): (4.424, 1.327, 1.337, 1.348),
}
ENCODERS = {
    "vitpose-b": (85.795, 16.421, 16.444, 17.100),
    "vitpose-l": (303.297, 58.133, 58.195, 59.945),
    "vitpose-h": (630.912, 120.985, 121.088, 124.005),
}
# Encoder of B at 1/8 features, all products.
ATTENTION_FORMS = [
    ({"attention": "full"}, 76.55),
    ({"attention": "window"}, 66.59),
    ({"attention": "window+shift"}, 66.59),
    ({"attention": "window+pool"}, 66.76),
    ({"attention": "window+shift+pool"}, 66.76),
    ({"attention": "window", "num_full_layers": 4}, 69.91),
    ({"attention": "window+shift+pool", "window": (16, 12)}, 68.46),
]


@pytest.mark.parametrize(("name", "decoder"), MODELS)
def test_model_costs_what_the_specification_counts(name: str, decoder: str) -> None:
    with torch.device("meta"):
        counted = count(create_model(name, decoder=decoder))
    parameters, layers, hooked, every = MODELS[name, decoder]
    assert million(counted.parameters) == parameters
    assert billion(counted.layers) == layers
    assert hooked is None or billion(counted.hooked) == hooked
    assert billion(counted.all) == every


@pytest.mark.parametrize(("name", "size"), OF_INPUTS)
def test_input_costs_what_the_specification_counts(name: str, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        counted = count(create_model(name, image_size=size), size)
    found = (million(counted.parameters), *map(billion, (counted.layers, counted.hooked)))
    assert (*found, billion(counted.all)) == OF_INPUTS[name, size]


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_costs_what_the_specification_counts(name: str) -> None:
    with torch.device("meta"):
        counted = count(create_model(name).backbone)
    found = (million(counted.parameters), *map(billion, (counted.layers, counted.hooked)))
    assert (*found, billion(counted.all)) == ENCODERS[name]


@pytest.mark.parametrize(("options", "expected"), ATTENTION_FORMS)
def test_attention_form_costs_what_the_specification_counts(
    options: dict[str, object], expected: float
) -> None:
    with torch.device("meta"):
        model = create_model("vitpose-b", patch_stride=8, **options)
    assert round(count(model.backbone).all / 1e9, 2) == expected


def test_each_layer_is_counted_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, groups=1),  # 8*6 places * 3*4*9, bias 4*8*6
        nn.BatchNorm2d(4),  # 2 * 4*8*6
        nn.ReLU(),  # 4*8*6
        nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1, bias=False),  # 8*6 places * 4*2*16
        nn.Flatten(),
        nn.Linear(2 * 16 * 12, 5),  # 384*5, bias 5
    )
    counted = count(model, (8, 6))
    layers = 48 * 108 + 48 * 128 + 384 * 5
    assert counted.layers == layers
    assert counted.hooked == layers + 192 + 384 + 192 + 5
    assert counted.all == layers
    assert counted.parameters == 108 + 4 + 8 + 128 + 1920 + 5


def test_counting_leaves_the_model_as_it_was() -> None:
    model = create_model("vitpose-s", image_size=(32, 32)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count(model, (32, 32))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
