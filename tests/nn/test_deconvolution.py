"""Deconvolution, norm and ReLU in one call: equal to the layers, and when it runs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import kernelpose
from kernelpose.models.decoders import ClassicDecoder
from kernelpose.nn.deconvolution import DeconvNormRelu
from tests.nn.inference import calls_of, check_deterministic, check_who_gets_it
from tests.parity import assert_parity

# (batch, C, outputs, (h, w))
CASES = {
    "even": (2, 16, 32, (4, 6)),
    "odd": (3, 37, 52, (5, 3)),
    "one-pixel": (1, 8, 48, (1, 1)),
    "one-row": (2, 5, 39, (1, 9)),
    "one-column": (1, 33, 65, (7, 1)),
    "many-tiles": (3, 24, 130, (13, 17)),
    "wide": (1, 640, 256, (8, 6)),
    "batch-0": (0, 16, 32, (4, 6)),
}


def layers(inputs: int, outputs: int) -> tuple[nn.ConvTranspose2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(outputs).eval()
    assert norm.running_mean is not None and norm.running_var is not None
    for tensor in (norm.weight, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)
    for tensor in (norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    deconv = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=False)
    return deconv, norm


def one_by_one(x: Tensor, deconv: nn.ConvTranspose2d, norm: nn.BatchNorm2d) -> Tensor:
    return norm(deconv(x)).relu()


@pytest.mark.parametrize("name", CASES)
def test_parity(name: str, poisoned: None) -> None:
    batch, inputs, outputs, size = CASES[name]
    deconv, norm = layers(inputs, outputs)
    x = torch.randn(batch, inputs, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        eager = one_by_one(x, deconv, norm)
        exact = one_by_one(x.double(), copy.deepcopy(deconv).double(), copy.deepcopy(norm).double())
        fused = DeconvNormRelu()
        assert fused.suits(x, deconv, norm, nn.ReLU())
        found = fused(x, deconv, norm)
        assert_parity(found, eager, exact)
        assert found.is_contiguous(memory_format=torch.channels_last)
        padded = nn.functional.pad(x, (1, 0))[..., 1:]
        for same in (x.contiguous(memory_format=torch.channels_last), padded):
            assert torch.equal(fused(same, deconv, norm), found)


def test_deterministic_whatever_the_threads() -> None:
    deconv, norm = layers(24, 130)
    x = torch.randn(3, 24, 13, 17)
    check_deterministic(lambda: DeconvNormRelu()(x, deconv, norm))


def decoder() -> ClassicDecoder:
    torch.manual_seed(0)
    made = ClassicDecoder(8, 5, (32, 39)).eval()
    for module in made.modules():
        if isinstance(module, nn.ConvTranspose2d):
            nn.init.normal_(module.weight, std=0.2)
    return made


calls = calls_of("deconvolution")


def test_who_gets_it() -> None:
    model, x = decoder(), torch.randn(2, 8, 4, 3)
    check_who_gets_it(calls, 2, model, x)
    with torch.no_grad():
        assert calls(lambda: model.train()(x))[1] == 0
        narrow = ClassicDecoder(8, 5, (32, 31)).eval()
        assert calls(lambda: narrow(x))[1] == 1


def test_what_was_packed_goes_stale() -> None:
    model, x = decoder(), torch.randn(1, 8, 4, 3)
    with torch.no_grad():
        before = model(x)
        model.get_buffer("deconv_layers.1.running_mean").add_(1.0)
        after = model(x)
        assert not torch.allclose(after, before)
        with kernelpose.backend("eager"):
            torch.testing.assert_close(after, model(x))
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), after)
        assert torch.equal(copy.deepcopy(model)(x), after)


def test_nan_reaches_what_it_reaches_layer_by_layer() -> None:
    deconv, norm = layers(3, 16)
    for row, column in ((2, 7), (3, 2), (0, 0), (4, 5)):
        x = torch.randn(1, 3, 5, 8)
        x[0, 1, row, column] = torch.nan
        with torch.no_grad():
            found, eager = DeconvNormRelu()(x, deconv, norm), one_by_one(x, deconv, norm)
        assert torch.equal(found.isnan(), eager.isnan())
