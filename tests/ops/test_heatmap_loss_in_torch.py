"""heatmap_loss inside PyTorch: compiled, exported, cast, transformed, captured, derived twice.

Every test runs on each backend that this machine has.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import kernelpose
from kernelpose.ops import heatmap_loss
from tests.ops import checks
from tests.ops.test_heatmap_loss import CASES, KERNELS
from tests.parity import assert_parity


def _labels(device: str) -> tuple[Tensor, Tensor]:
    """Of two persons in an input of 32 x 24."""
    generator = torch.Generator().manual_seed(1)
    keypoints = torch.rand(2, 3, 2, generator=generator) * torch.tensor([24.0, 32.0])
    return keypoints.to(device), torch.tensor([[1.0, 0.0, 1.0], [2.0, 1.0, 1.0]], device=device)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "batch-0"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(name: str, grad: bool, backend: str) -> None:
    case = CASES[name]
    (pred,) = case.inputs(torch.float32, checks.device_for(backend))
    keypoints, visible = case.labels(pred.device)
    args = (pred.detach().requires_grad_(grad), keypoints.nan_to_num(), visible)
    options = (list(case.input_size), case.sigma, case.codec, backend)
    # The mean of nothing is NaN, which opcheck would not find equal to itself.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    extra = () if name == "batch-0" else ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(
        torch.ops.kernelpose.heatmap_loss.default, (*args, *options), test_utils=(*tests, *extra)
    )


@pytest.mark.parametrize(
    ("name", "backend"), [*itertools.product(["small", "odd-unbiased"], [*KERNELS, "eager"])]
)
def test_compiles_to_one_graph(name: str, backend: str) -> None:
    case = CASES[name]
    device = "cpu" if backend == "eager" else checks.device_for(backend)
    inputs = case.inputs(torch.float32, device)
    (_, *labels), options = case.arguments(inputs)
    checks.check_compile(
        lambda pred: heatmap_loss(pred, *labels, **options, backend=backend), *inputs
    )


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_side_stream_and_graph_capture(backend: str) -> None:
    checks.check_side_stream(CASES["small"], backend)
    checks.check_graph_capture(CASES["small"], backend)


@pytest.mark.full
@pytest.mark.parametrize("backend", KERNELS)
def test_compiles_with_inductor_and_dynamic_sizes(backend: str) -> None:
    """The input's size may be symbolic as well."""
    device = checks.device_for(backend)

    def run(pred: Tensor, keypoints: Tensor, visible: Tensor, images: Tensor) -> Tensor:
        size = (images.shape[2], images.shape[3])
        return heatmap_loss(pred, keypoints, visible, input_size=size, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for batch, height, width in ((2, 8, 8), (3, 9, 7), (5, 16, 12)):
        pred = torch.rand(batch, 4, height, width, device=device, requires_grad=True)
        keypoints = 20 * torch.rand(batch, 4, 2, device=device)
        images = torch.empty(batch, 3, 4 * height, 4 * width, device=device)
        given = (keypoints, torch.ones(batch, 4, device=device), images)
        losses = [function(pred, *given) for function in (compiled, run)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, pred) for loss in losses))


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 3, 1)

    def forward(self, features: Tensor, keypoints: Tensor, visible: Tensor) -> Tensor:
        return heatmap_loss(self.layer(features), keypoints, visible, input_size=(32, 24))


@pytest.mark.parametrize("backend", KERNELS)
def test_export(backend: str) -> None:
    """The program holds the op, and its batch size has no bound."""
    device = checks.device_for(backend)
    head, labels = _Head().to(device).eval(), _labels(device)
    shapes = tuple({0: torch.export.Dim("batch")} for _ in range(3))
    args = (torch.randn(2, 4, 8, 6, device=device), *labels)
    other = tuple(torch.cat((t, t, t)) for t in args)
    with kernelpose.backend(backend):
        program = torch.export.export(head, args, dynamic_shapes=shapes)
        expected = head(*other)
    assert "kernelpose.heatmap_loss" in program.graph_module.code
    assert f"'{backend}'" in program.graph_module.code
    torch.testing.assert_close(program.module()(*other), expected)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_autocast_leaves_it_in_float32(backend: str) -> None:
    device = "cpu" if backend == "eager" else checks.device_for(backend)
    pred, labels = torch.rand(2, 3, 8, 6, device=device, requires_grad=True), _labels(device)
    plain = heatmap_loss(pred, *labels, input_size=(32, 24), backend=backend)
    with torch.autocast(device, torch.bfloat16):
        loss = heatmap_loss(pred, *labels, input_size=(32, 24), backend=backend)
        narrow = heatmap_loss(pred.bfloat16(), *labels, input_size=(32, 24), backend=backend)
    assert torch.equal(loss, plain) and narrow.dtype == torch.float32
    assert torch.autograd.grad(loss, pred)[0].dtype == torch.float32


@pytest.mark.parametrize("backend", KERNELS)
def test_inference_mode_and_the_way_around_the_dispatcher(backend: str) -> None:
    case = CASES["small"]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    registered = case.run(inputs, backend)
    assert registered.grad_fn is not None
    with torch.inference_mode():
        direct = case.run([x.detach() for x in inputs], backend)
    assert torch.equal(direct, registered)


@pytest.mark.parametrize("backend", KERNELS)
def test_function_transforms(backend: str) -> None:
    """torch.func sees plain PyTorch, which agrees with the kernel's own backward."""
    device = checks.device_for(backend)
    pred, labels = torch.rand(4, 2, 3, 8, 6, device=device), _labels(device)

    def loss(x: Tensor, name: str | None = None) -> Tensor:
        return heatmap_loss(x, *labels, input_size=(32, 24), backend=name)

    transformed, exact = (torch.func.vmap(torch.func.grad(loss))(x) for x in (pred, pred.double()))
    leaf = pred.clone().requires_grad_()
    torch.stack([loss(x, backend) for x in leaf]).sum().backward()
    assert leaf.grad is not None
    assert_parity(leaf.grad, transformed, exact)


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivative_is_refused_and_eager_has_it(backend: str) -> None:
    device = checks.device_for(backend)
    pred, labels = torch.rand(2, 3, 8, 6, device=device, requires_grad=True), _labels(device)
    for name in (backend, "eager"):
        loss = heatmap_loss(pred, *labels, input_size=(32, 24), backend=name)
        (first,) = torch.autograd.grad(loss, pred, create_graph=True)
        if name == backend:
            refusal = f"backend is '{backend}'; expected 'eager' for a second derivative"
            with pytest.raises(RuntimeError, match=refusal):
                torch.autograd.grad(first.square().sum(), pred)
        else:
            assert torch.autograd.grad(first.square().sum(), pred)[0].abs().max() > 0
