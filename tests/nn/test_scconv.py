"""ScConv against the released code's outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernelpose
from kernelpose.nn import ScConv


@pytest.mark.parametrize("backend", ["cpu", "eager"])
class TestScConv:
    def test_golden_outputs_of_the_released_code(self, backend: str, shared: Path) -> None:
        golden = torch.load(shared / "golden" / "mitpose_modules_released.pt", weights_only=True)[
            "scconv"
        ]
        module = ScConv(64)
        module.load_state_dict(golden["state_dict"])
        with torch.no_grad(), kernelpose.backend(backend):
            out = module(golden["input"])
            maps = golden["input"].transpose(1, 2).reshape(2, 64, 16, 12)
            of_maps = module(maps)
        torch.testing.assert_close(out, golden["output"], rtol=1e-4, atol=1e-6)
        tokens = of_maps.flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, golden["output"], rtol=1e-4, atol=1e-6)

    def test_maps_of_any_size(self, backend: str) -> None:
        module = ScConv(32)
        x = torch.randn(2, 32, 7, 5)
        with kernelpose.backend(backend):
            tokens = module(x.flatten(2).transpose(1, 2), (7, 5))
            maps = module(x)
        torch.testing.assert_close(tokens, maps.flatten(2).transpose(1, 2))

    def test_trains(self, backend: str) -> None:
        """Every parameter, and the input, gets a gradient."""
        module = ScConv(32, grn=True)
        torch.nn.init.ones_(module.GRN.gamma)
        x = torch.randn(2, 192, 32, requires_grad=True)
        with kernelpose.backend(backend):
            module(x).square().sum().backward()
        for tensor in (x, *module.parameters()):
            assert tensor.grad is not None and tensor.grad.abs().max() > 0

    def test_grn_is_last_and_starts_as_the_identity(self, backend: str) -> None:
        plain, refined = ScConv(32), ScConv(32, grn=True)
        missing, unexpected = refined.load_state_dict(plain.state_dict(), strict=False)
        assert missing == ["GRN.gamma", "GRN.beta"] and not unexpected
        assert refined.GRN.gamma.shape == (1, 32, 1, 1)
        x = torch.randn(2, 32, 6, 5)
        with torch.no_grad(), kernelpose.backend(backend):
            assert torch.equal(refined(x), plain(x))
            torch.nn.init.normal_(refined.GRN.gamma)
            expected = kernelpose.ops.grn(plain(x), refined.GRN.gamma, refined.GRN.beta)
            assert torch.equal(refined(x), expected)

    def test_pairwise_weights_are_larger(self, backend: str) -> None:
        """Under the joint softmax they average 1 / 2C, pairwise 1 / 2."""
        module = ScConv(32, softmax="pairwise")
        joint = ScConv(32)
        joint.load_state_dict(module.state_dict())
        x = torch.randn(2, 32, 6, 5)
        with torch.no_grad(), kernelpose.backend(backend):
            assert module(x).std() > 10 * joint(x).std()

    def test_compiles_to_one_graph(self, backend: str) -> None:
        module = ScConv(32, grn=True)
        x = torch.randn(2, 192, 32)
        with torch.no_grad(), kernelpose.backend(backend):
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), module(x))

    def test_wrong_number_of_tokens(self, backend: str) -> None:
        with pytest.raises(ValueError, match="x has 100 tokens; expected 192, as size is") as error:
            ScConv(32)(torch.zeros(1, 100, 32))
        assert str(error.value).endswith(".")


def test_parameters_of_mitpose_b() -> None:
    """1.073 M with the normalisation at the end."""
    count = sum(p.numel() for p in ScConv(768, grn=True).parameters())
    assert round(count / 1e6, 3) == 1.073


def test_channels_last_needs_no_copy_between_the_units() -> None:
    """Tokens in, the same memory format all the way."""
    module, formats = ScConv(32), []
    for unit in (module.SRU, module.CRU):
        unit.register_forward_hook(
            lambda _, __, out: formats.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    out: Tensor = module(torch.randn(2, 192, 32))
    assert formats == [True, True] and out.is_contiguous()
