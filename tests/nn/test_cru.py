"""CRU against the released code's lines."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernelpose
from kernelpose import ops
from kernelpose.nn import CRU
from kernelpose.ops import _winograd


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in module.state_dict().items()}


def test_state_dict_is_that_of_the_released_code() -> None:
    """Also of uneven parts."""
    assert _shapes(CRU(64)) == {
        "squeeze1.weight": (16, 32, 1, 1),
        "squeeze2.weight": (16, 32, 1, 1),
        "GWC.weight": (64, 8, 3, 3),
        "GWC.bias": (64,),
        "PWC1.weight": (64, 16, 1, 1),
        "PWC2.weight": (48, 16, 1, 1),
    }
    assert _shapes(CRU(64, 0.25, 4, 4, 5)) == {
        "squeeze1.weight": (4, 16, 1, 1),
        "squeeze2.weight": (12, 48, 1, 1),
        "GWC.weight": (64, 1, 5, 5),
        "GWC.bias": (64,),
        "PWC1.weight": (64, 4, 1, 1),
        "PWC2.weight": (52, 12, 1, 1),
    }


@pytest.mark.parametrize("softmax", ["joint", "pairwise"])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.25, "squeeze_radio": 4}])
def test_written_out(options: dict[str, Any], softmax: str) -> None:
    """As the published lines, convolution by convolution; pairwise as the paper has it."""
    module = CRU(64, **options, softmax=softmax)
    for x in (torch.randn(2, 64, 5, 7), torch.randn(2, 5, 7, 64).permute(0, 3, 1, 2)):
        up, low = x.split([module.up_channel, 64 - module.up_channel], 1)
        up, low = F.conv2d(up, module.squeeze1.weight), F.conv2d(low, module.squeeze2.weight)
        first = F.conv2d(up, module.GWC.weight, module.GWC.bias, padding=1, groups=2)
        first = first + F.conv2d(up, module.PWC1.weight)
        second = torch.cat([F.conv2d(low, module.PWC2.weight), low], 1)
        means = torch.stack((first, second), 1).mean((3, 4), keepdim=True)
        if softmax == "joint":
            shares = means.flatten(1, 2).softmax(1).view_as(means)
        else:
            shares = means.softmax(1)
        expected = shares[:, 0] * first + shares[:, 1] * second
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((8, 0.1), r"alpha is 0\.1; expected two parts of the 8 channels"),
        ((8, 0.9), r"alpha is 0\.9; expected two parts of the 8 channels"),
        ((8, 0.5, 2, 2, 4), "group_kernel_size is 4; expected an odd number"),
    ],
)
def test_errors_name_the_argument(args: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CRU(*args)


def _maps(*shape: int, tokens: bool = True) -> Tensor:
    layout = torch.channels_last if tokens else torch.contiguous_format
    return torch.randn(*shape).contiguous(memory_format=layout)


class TestWinograd:
    """On a CPU in eval mode, in float32, a transform computes GWC and PWC1 together."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Has an element for each call of the transform."""
        calls: list[int] = []
        convolve = _winograd.convolve

        def count(*args: Any) -> Tensor:
            calls.append(1)
            return convolve(*args)

        monkeypatch.setattr(_winograd, "convolve", count)
        return calls

    def test_maps_that_are_fused(self) -> None:
        """Both of them against float64: groups, shares, maps of odd sizes, of more than a round of
        tiles, both memory formats."""
        fused: list[tuple[Tensor, ...]] = []
        for channels, options, shape in (
            (256, {}, (16, 12)),
            (128, {"group_size": 1}, (9, 7)),
            (512, {"group_size": 4}, (12, 5)),
            (512, {"alpha": 0.25, "group_size": 2}, (7, 8)),
            (256, {}, (14, 15)),
        ):
            module = CRU(channels, **options).eval()
            exact = CRU(channels, **options).double()
            exact.load_state_dict(module.state_dict())
            for tokens in (True, False):
                x = _maps(2, channels, *shape, tokens=tokens)
                fused.clear()
                with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
                    patch.setattr(ops, "channel_fuse", lambda *y, softmax: fused.append(y))
                    assert module._by_winograd(x)
                    module(x)
                    module.train()(x)
                    module.eval()
                    exact(x.double())
                for got, plain, expected in zip(*fused, strict=True):
                    assert got.is_contiguous(memory_format=torch.channels_last)
                    error, of_plain = ((y - expected).abs().max() for y in (got, plain))
                    assert 0 < error < 4 * of_plain

    @pytest.mark.parametrize("tokens", [True, False])
    def test_of_the_module(self, tokens: bool, calls: list[int]) -> None:
        module, x = CRU(256).eval(), _maps(2, 256, 16, 12, tokens=tokens)
        before = x.clone()
        with torch.no_grad():
            got = module(x)
            assert len(calls) == 1
            for backend in ("cpu", "eager"):
                with kernelpose.backend(backend):
                    expected = module(x)
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)
        assert len(calls) == 1
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, before)

    def test_elsewhere_the_convolutions_run(self, calls: list[int]) -> None:
        module, x = CRU(256).eval(), _maps(2, 256, 16, 12)
        module(x).sum().backward()
        with torch.no_grad():
            module.train()(x)
            module.eval()(x[:, :, :4, :6])  # too few tiles
            module(x[:0])
            CRU(128).eval()(x[:, :128])  # too few channels
            CRU(256, group_kernel_size=5).eval()(x)
            with torch.autocast("cpu", torch.bfloat16):
                module(x)
            torch.compile(module, fullgraph=True, backend="aot_eager")(x)
            module.bfloat16()(x.bfloat16())
            module.double()(x.double())
        assert not calls

    def test_follows_its_weights(self, calls: list[int]) -> None:
        module, x = CRU(256).eval(), _maps(1, 256, 16, 12)
        with torch.no_grad():
            module(x)
            for weight in module.parameters():
                weight.mul_(-2)
                got = module(x)
                with kernelpose.backend("eager"):
                    torch.testing.assert_close(got, module(x), rtol=1e-5, atol=1e-8)
        assert len(calls) == 7

    def test_the_threads_change_no_bit(self) -> None:
        module, threads = CRU(256).eval(), torch.get_num_threads()
        try:
            for batch in (1, 3):
                x, results = torch.randn(batch, 14, 12, 64), []
                ((packed,),) = module._folder([(module.GWC, module.PWC1)])
                for count in (1, 2, 4):
                    torch.set_num_threads(count)
                    results.append(_winograd.convolve(x, packed.detach(), 2))
                assert torch.equal(results[0], results[1])
                assert torch.equal(results[0], results[2])
        finally:
            torch.set_num_threads(threads)

    def test_copies_and_files_hold_no_transform(self) -> None:
        module, x = CRU(256).eval(), _maps(1, 256, 16, 12)
        with torch.no_grad():
            expected = module(x)
            file = io.BytesIO()
            torch.save(module, file)
            assert file.tell() < 1.1 * sum(p.nbytes for p in module.parameters())
            file.seek(0)
            for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
                assert torch.equal(other(x), expected)
