"""spatial_gate: every backend against the reference, and the reference against its meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kernelpose.backend import OPS
from kernelpose.ops import spatial_gate
from tests.ops import checks
from tests.parity import assert_parity

KERNELS = ("cpu", "cuda", "triton")


@dataclass(frozen=True)
class Case:
    """Its maps keep away from the jump: rounding must not decide on which side a pixel is."""

    shape: tuple[int, int, int, int]  # (B, C, H, W)
    groups: int = 4
    tokens: bool = False  # as tokens lie: channels_last
    threshold: float = 0.5
    eps: float = 1e-5
    op: str = "spatial_gate"

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        wide = dtype if dtype == torch.float64 else torch.float32
        channels = self.shape[1]
        x, noise = torch.randn(2, *self.shape, generator=generator, dtype=torch.float64)
        weight, bias = torch.randn(2, channels, generator=generator, dtype=torch.float64)
        weight, bias = (p.to(wide) for p in (1 + 0.6 * weight, bias))  # some below zero
        x = (3 + 2 * x).to(dtype)
        if device != "meta" and x.numel():
            for _ in range(100):
                near = self.nearness(x, weight, bias) < 1e-2
                if not near.any():
                    break
                x = torch.where(near, x + (0.1 + noise.abs()).to(dtype), x)
            assert not near.any()
        x = x.contiguous(memory_format=torch.channels_last) if self.tokens else x
        return [t.to(device).requires_grad_() for t in (x, weight, bias)]

    def nearness(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """How far the normalised maps are from where the gate jumps."""
        weight, bias = weight.double(), bias.double()
        normalized = torch.group_norm(x.double(), self.groups, weight, bias, self.eps)
        limit = torch.logit(torch.tensor(self.threshold, dtype=torch.float64))
        share = (weight / weight.sum()).reshape(1, -1, 1, 1)
        return (normalized - limit / share).abs()

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        options = {"groups": self.groups, "threshold": self.threshold, "eps": self.eps}
        return tuple(inputs), options

    def run(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        args, options = self.arguments(inputs)
        return spatial_gate(*args, **options, backend=backend)


CASES = {
    "small": Case((2, 8, 3, 4)),
    "small-tokens": Case((2, 8, 3, 4), tokens=True),
    "mitpose": Case((2, 768, 16, 12)),
    "mitpose-tokens": Case((2, 768, 16, 12), tokens=True),
    "odd": Case((3, 36, 5, 7), groups=2, threshold=0.51),
    "odd-tokens": Case((3, 36, 5, 7), groups=2, tokens=True, threshold=0.51),
    "odd-groups": Case((2, 42, 5, 3), groups=3),
    "odd-groups-tokens": Case((2, 42, 5, 3), groups=3, tokens=True, threshold=0.4),
    "one-group": Case((2, 10, 4, 4), groups=1, threshold=0.6),
    "group-a-channel": Case((2, 34, 4, 5), groups=34, tokens=True),
    "wide-tokens": Case((1, 2200, 3, 3), groups=10, tokens=True),
    "large-map": Case((1, 24, 64, 48), groups=4, eps=0.1),
    "large-map-tokens": Case((1, 24, 64, 48), groups=4, tokens=True),
    "all-informative": Case((2, 16, 3, 5), threshold=0.0),
    "none-informative": Case((2, 16, 3, 5), threshold=1.0),
    "one-pixel": Case((2, 16, 1, 1)),
    "batch-0": Case((0, 8, 3, 4)),
}
NO_PIXELS = Case((2, 8, 0, 4))  # eager divides 0 by 0 for the gradient of the weight


@pytest.mark.parametrize(("case", "backend", "dtype"), checks.parity_matrix(CASES))
def test_parity(case: Case, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    checks.check_parity(case, backend, dtype)


@pytest.mark.parametrize("name", ["small", "odd-groups"])
def test_reference_by_its_meaning(name: str) -> None:
    """Written out pixel by pixel."""
    case = CASES[name]
    x, weight, bias = (t.detach() for t in case.inputs(torch.float64))
    got = case.run([x, weight, bias], "eager")
    channels, size = case.shape[1], case.shape[1] // case.groups
    groups = x.unflatten(1, (case.groups, size)).flatten(2)
    deviation = (groups.var(-1, correction=0) + case.eps).sqrt()
    for image in range(case.shape[0]):
        kept, rest = torch.empty_like(x[image]), torch.empty_like(x[image])
        for c in range(channels):
            mean = groups[image, c // size].mean()
            y = (x[image, c] - mean) / deviation[image, c // size] * weight[c] + bias[c]
            gate = 1 / (1 + (-y * weight[c] / sum(weight)).exp())
            for place, r in enumerate(gate.flatten()):
                value = x[image, c].flatten()[place]
                hot = r > case.threshold
                kept[c].flatten()[place] = value if hot else r * value
                rest[c].flatten()[place] = 0 if hot else r * value
        for c in range(channels):
            expected = kept[c] + rest[(c + channels // 2) % channels]
            torch.testing.assert_close(got[image, c], expected)


def _flat(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Maps that are constant, each group at its own value, whose sums are exact: normalised they
    are the bias alone."""
    x = torch.tensor([0.75, -1.25, 2.0, 5.5], device=device).repeat_interleave(4)
    x = x.reshape(1, 16, 1, 1).repeat(1, 1, 5, 7)
    return x, torch.linspace(0.5, 2, 16, device=device), torch.zeros(16, device=device)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
@pytest.mark.parametrize("tokens", [False, True])
def test_at_the_jump(tokens: bool, backend: str) -> None:
    """A gate of exactly the threshold is not above it, and the smallest step beyond it is.

    eps is large, or eager's own rounding would be magnified beyond that step.
    """
    x, weight, bias = _flat(checks.device_for(backend))
    x = x.contiguous(memory_format=torch.channels_last) if tokens else x
    partner = x.roll(8, 1)
    at = spatial_gate(x, weight, bias, groups=4, eps=1.0, backend=backend)
    torch.testing.assert_close(at, 0.5 * (x + partner))
    above = spatial_gate(x, weight, bias + 1e-4, groups=4, eps=1.0, backend=backend)
    torch.testing.assert_close(above, x)
    below = spatial_gate(x, weight, bias - 1e-4, groups=4, eps=1.0, backend=backend)
    torch.testing.assert_close(below, 0.5 * (x + partner), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_gradient_at_the_jump_is_that_of_the_side_taken(backend: str) -> None:
    x, weight, bias = _flat(checks.device_for(backend))
    for step in (1e-4, 0.0):  # above the threshold, and not
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias + step)]
        out = spatial_gate(*leaves, groups=4, eps=1.0, backend=backend)
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
        got = torch.autograd.grad(out, leaves, grad)
        if step:
            torch.testing.assert_close(got[0], grad)
            assert not got[1].any() and not got[2].any()
            continue
        both = 0.5 * (grad + grad.roll(8, 1))
        u = 0.25 * x * 2 * both  # what reaches the argument of the sigmoid
        share = (weight / weight.sum()).reshape(1, -1, 1, 1)
        inner = u * share * weight.reshape(1, -1, 1, 1)
        mean = inner.reshape(4, -1).mean(1).repeat_interleave(4).reshape(1, 16, 1, 1)
        torch.testing.assert_close(got[0], both + inner - mean)
        torch.testing.assert_close(got[2], (u * share).sum((0, 2, 3)))


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_gradients_through_the_released_code(backend: str) -> None:
    """As autograd gives them through the published lines, Python sum and all."""
    case = CASES["odd-groups"]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    x, weight, bias = inputs
    normalized = torch.nn.functional.group_norm(x, case.groups, weight, bias, case.eps)
    gate = torch.sigmoid(normalized * (weight / sum(weight)).view(1, -1, 1, 1))
    first = torch.where(gate > case.threshold, torch.ones_like(gate), gate) * x
    second = torch.where(gate > case.threshold, torch.zeros_like(gate), gate) * x
    (a, b), (c, d) = (torch.split(t, x.shape[1] // 2, 1) for t in (first, second))
    expected = torch.cat([a + d, b + c], 1)
    got = case.run(inputs, backend)
    torch.testing.assert_close(got, expected)
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
    pairs = zip(
        torch.autograd.grad(got, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [Case((2, 4, 2, 3), 2), Case((2, 6, 2, 3), 3, tokens=True)])
def test_gradcheck(case: Case) -> None:
    """The C++ backward in float64 against finite differences."""
    torch.autograd.gradcheck(lambda *x: case.run(x, "cpu"), case.inputs(torch.float64))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "odd-groups", "mitpose"])
def test_memory_formats(name: str, backend: str) -> None:
    checks.check_memory_formats(CASES[name], backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("tokens", [False, True])
def test_a_large_mean_costs_no_digits(tokens: bool, backend: str) -> None:
    """The variance of 1000 + noise is that of the noise, as it is in eager."""
    case = Case((2, 16, 6, 8), tokens=tokens)
    x, weight, bias = (t.detach() for t in case.inputs(torch.float32, checks.device_for(backend)))
    x = x + 1000
    near = case.nearness(x, weight, bias) < 1e-2
    got, exact = case.run([x, weight, bias], backend), case.run([x.double(), weight, bias], "eager")
    unsure = near | near.roll(8, 1)
    torch.testing.assert_close(got[~unsure], exact.float()[~unsure], rtol=2e-5, atol=0)
    assert (~unsure).float().mean() > 0.9


@pytest.mark.parametrize("backend", KERNELS)
def test_no_pixels(backend: str) -> None:
    inputs = NO_PIXELS.inputs(torch.float32, checks.device_for(backend))
    out = NO_PIXELS.run(inputs, backend)
    assert out.shape == NO_PIXELS.shape
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert not gradients[1].any() and not gradients[2].any()


@pytest.mark.parametrize("backend", KERNELS)
def test_parameters_of_any_dtype(backend: str) -> None:
    x, *parameters = CASES["small"].inputs(torch.float32, checks.device_for(backend))
    out = spatial_gate(x, *parameters, groups=4, backend=backend)
    expected = torch.autograd.grad(out.square().sum(), parameters)
    wide = [p.detach().double().requires_grad_() for p in parameters]
    out = spatial_gate(x, *wide, groups=4, backend=backend)
    for ours, same in zip(torch.autograd.grad(out.square().sum(), wide), expected, strict=True):
        assert ours.dtype == torch.float64 and torch.equal(ours.float(), same)


@pytest.mark.parametrize("backend", KERNELS)
def test_nan_spreads_over_its_group_and_its_partners(backend: str) -> None:
    x, weight, bias = CASES["small"].inputs(torch.float32, checks.device_for(backend))
    with torch.no_grad():
        x[1, 1, 2, 3] = torch.nan
    out = spatial_gate(x, weight, bias, groups=4, backend=backend)
    lost = out.isnan().flatten(2).all(-1)
    assert lost[1].tolist() == [True, True, False, False] * 2
    assert out[~lost].isfinite().all()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["odd", "odd-tokens", "mitpose", "mitpose-tokens", "wide-tokens"])
def test_deterministic_whatever_the_threads(name: str, backend: str) -> None:
    checks.check_deterministic(CASES[name], backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "small-tokens"])
def test_inputs_are_never_written_wherever_they_start(name: str, backend: str) -> None:
    """Views that start in the middle of a vector give what others give."""
    checks.check_inputs_kept(CASES[name], backend, exact=False)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "small-tokens", "batch-0", "no-pixels"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(name: str, grad: bool, backend: str) -> None:
    inputs = (CASES | {"no-pixels": NO_PIXELS})[name].inputs(
        torch.float32, checks.device_for(backend)
    )
    args = (*(x.detach().requires_grad_(grad) for x in inputs), 4, 0.5, 1e-5, backend)
    torch.library.opcheck(torch.ops.kernelpose.spatial_gate.default, args)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
@pytest.mark.parametrize("name", ["small", "small-tokens"])
def test_compiles_to_one_graph(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    checks.check_compile(lambda *x: case.run(x, backend), *inputs)


@pytest.mark.parametrize("backend", KERNELS)
def test_export(backend: str) -> None:
    """The program holds the op, and takes any batch and height."""

    class Gate(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return spatial_gate(x, weight, bias, groups=2, backend=backend)

    device = checks.device_for(backend)
    shapes = ({0: torch.export.Dim("batch"), 2: torch.export.Dim("height")}, None, None)
    parameters = torch.rand(2, 8, device=device).unbind()
    x, other = torch.randn(2, 8, 5, 6, device=device), torch.randn(3, 8, 9, 6, device=device)
    program = torch.export.export(Gate(), (x, *parameters), dynamic_shapes=shapes)
    assert "kernelpose.spatial_gate" in program.graph_module.code
    assert torch.equal(program.module()(other, *parameters), Gate()(other, *parameters))


@pytest.mark.parametrize("backend", KERNELS)
def test_autocast_leaves_it_alone(backend: str) -> None:
    checks.check_autocast_leaves_alone(CASES["small"], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_inference_mode_and_the_way_around_the_dispatcher(backend: str) -> None:
    checks.check_around_dispatcher(CASES["odd-tokens"], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_function_transforms(backend: str) -> None:
    """torch.func sees plain PyTorch, which agrees with the kernel's own backward."""
    x, weight, bias = (
        t.detach() for t in CASES["small"].inputs(torch.float32, checks.device_for(backend))
    )

    def total(x: Tensor, name: str | None = None) -> Tensor:
        parameters = (p.to(x.dtype) for p in (weight, bias))
        return spatial_gate(x[None], *parameters, groups=4, backend=name).square().sum()

    transformed, exact = (torch.func.vmap(torch.func.grad(total))(t) for t in (x, x.double()))
    leaf = x.clone().requires_grad_()
    torch.stack([total(image, backend) for image in leaf]).sum().backward()
    assert leaf.grad is not None
    assert_parity(leaf.grad, transformed, exact)


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivative_is_refused_and_eager_has_it(backend: str) -> None:
    x, *rest = CASES["small"].inputs(torch.float32, checks.device_for(backend))
    for name in (backend, "eager"):
        out = spatial_gate(x, *rest, groups=4, backend=name)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        if name == backend:
            with pytest.raises(RuntimeError, match=f"backend is '{backend}'; expected 'eager' for"):
                torch.autograd.grad(first.square().sum(), x)
        else:
            assert torch.autograd.grad(first.square().sum(), x)[0].abs().max() > 0


ZEROS = torch.zeros(2, 8, 3, 4)
EIGHT = torch.zeros(8)


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        (([1.0], EIGHT, EIGHT), {}, TypeError, "x is list; expected a tensor"),
        ((ZEROS.long(), EIGHT, EIGHT), {}, TypeError, r"x is torch\.int64; expected a floating"),
        ((ZEROS[0], EIGHT, EIGHT), {}, ValueError, r"x has shape \(8, 3, 4\); expected \(B, C, H"),
        ((ZEROS[:, :7], EIGHT, EIGHT), {}, ValueError, "x has 7 channels; expected an even number"),
        ((ZEROS, EIGHT, EIGHT), {"groups": 3}, ValueError, "groups is 3; expected a divisor of"),
        ((ZEROS, EIGHT, EIGHT), {"groups": 0}, ValueError, "groups is 0; expected a divisor of"),
        ((ZEROS, EIGHT, EIGHT), {"groups": 2.0}, ValueError, r"groups is 2\.0; expected a div"),
        ((ZEROS, None, EIGHT), {}, TypeError, "weight is NoneType; expected a tensor"),
        ((ZEROS, EIGHT[:7], EIGHT), {}, ValueError, r"weight has shape \(7,\); expected \(8,\)"),
        ((ZEROS, EIGHT, EIGHT.int()), {}, TypeError, r"bias is torch\.int32; expected a float"),
        ((ZEROS, EIGHT, EIGHT.to("meta")), {}, ValueError, "bias is on meta; expected cpu, as x"),
        ((ZEROS, EIGHT, EIGHT), {"eps": "1"}, TypeError, "eps is '1'; expected a number"),
        ((ZEROS, EIGHT, EIGHT), {"eps": -1.0}, ValueError, r"eps is -1\.0; expected at least 0"),
        ((ZEROS, EIGHT, EIGHT), {"threshold": 1.5}, ValueError, r"threshold is 1\.5; expected 0"),
        ((ZEROS, EIGHT, EIGHT), {"threshold": None}, TypeError, "threshold is None; expected a n"),
        ((ZEROS, EIGHT, EIGHT), {"backend": "metal"}, ValueError, "backend is 'metal'"),
    ],
)
def test_errors_name_the_argument(
    args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        spatial_gate(*args, **{"groups": 4, **options})
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("shape", "groups", "text"),
    [
        ((2**20, 2048, 1, 1), 4, "channels of all images, and this has 2147483648"),
        ((1, 2, 2**15, 2**15), 2, "elements of an image, and this has 2147483648"),
        ((1, 16386, 1, 1), 1, "fewer than 8193 channels of a pair of groups, and this has 16386"),
    ],
)
def test_no_room_is_an_objection(shape: tuple[int, ...], groups: int, text: str) -> None:
    x = torch.empty(shape, device="meta")
    reason = OPS["spatial_gate"].objection("cuda", x, x[0, :, 0, 0], x[0, :, 0, 0], groups=groups)
    assert reason is not None and text in reason


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", ["mitpose", "mitpose-tokens"])
def test_side_stream_and_graph_capture(name: str, backend: str) -> None:
    checks.check_side_stream(CASES[name], backend)
    checks.check_graph_capture(CASES[name], backend)


def test_weights_without_a_sum_are_not_a_number() -> None:
    """As in plain PyTorch: shares of nothing."""
    x = CASES["small"].inputs(torch.float32)[0].detach()
    for backend in ("cpu", "eager"):
        assert spatial_gate(x, EIGHT, EIGHT, groups=4, backend=backend).isnan().all()
