"""heatmap_loss on ViTPose's heatmaps: the loss by itself, and with its gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rows import Function, Row, fit_l2, rotate, time_forward
from benchmarks.setup import compiled, parameters
from benchmarks.timing import time_all
from kernelpose.backend import BACKENDS, choose, why_not
from kernelpose.ops import heatmap_loss
from kernelpose.pipeline import plain
from kernelpose.pipeline.timing import synchronized
from tests.parity import assert_parity

JOINTS = 17
# height and width of the maps, a quarter of the input's
CASES = {"loss 64x48": ((64, 48), (1, 64)), "loss 96x72": ((96, 72), (64,))}


def _plain(
    pred: Tensor, keypoints: Tensor, visible: Tensor, *, input_size: tuple[int, int]
) -> Tensor:
    """Targets drawn by numpy as a data set does it, then what mmpose's KeypointMSELoss computes."""
    drawn = plain.udp_targets(
        keypoints.numpy(), visible.numpy(), input_size=input_size,
        heatmap_size=(pred.shape[2], pred.shape[3]),
    )  # fmt: skip
    targets, weights = (torch.from_numpy(array) for array in drawn)
    error = F.mse_loss(pred, targets, reduction="none")
    return (error * weights[..., None, None]).mean()


def _with_gradient(loss: Function) -> Function:
    def run(pred: Tensor, *labels: Tensor) -> Tensor:
        return torch.autograd.grad(loss(pred, *labels), pred)[0]

    return run


@pytest.mark.parametrize(("size", "batch", "dtype"), parameters(CASES))
def bench_heatmap_loss(
    size: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compiles: bool,
    record: Callable[[Row], None],
    benchmark: Any,
    request: pytest.FixtureRequest,
) -> None:
    height, width = input_size = (4 * size[0], 4 * size[1])

    def inputs() -> list[Tensor]:
        """Joints anywhere in the input, two of three visible."""
        pred = torch.randn(batch, JOINTS, *size, device=device, dtype=dtype).requires_grad_()
        ends = torch.tensor([width - 1.0, height - 1.0], device=device)
        keypoints = torch.rand(batch, JOINTS, 2, device=device) * ends
        visible = (torch.rand(batch, JOINTS, device=device) < 2 / 3).float()
        return [pred, keypoints, visible]

    torch.manual_seed(0)
    sets = rotate(inputs, device)
    options = {"input_size": input_size}
    chosen = choose("heatmap_loss", None, *sets[0], **options)
    names = [
        b for b in BACKENDS if b == "eager" or not why_not("heatmap_loss", b, *sets[0], **options)
    ]
    losses: dict[str, Function] = {
        name: functools.partial(heatmap_loss, input_size=input_size, backend=name) for name in names
    }
    if device.type == "cpu":
        losses["plain"] = functools.partial(_plain, input_size=input_size)
    _check_parity(losses, sets[0])
    if compiles:
        losses |= compiled({"compile": losses["eager"]})
    steps = {name: _with_gradient(loss) for name, loss in losses.items()}
    times = {
        "forward": time_forward(losses, sets, device),
        "fwd+bwd": time_all(
            {
                n: [functools.partial(step, *tensors) for tensors in sets]
                for n, step in steps.items()
            },
            device,
        ),
    }
    for direction, taken in times.items():
        row = Row(
            "heatmap_loss", request.node.callspec.id, direction, str(dtype)[6:], taken,
            tuple(n for n in names if n != "eager"), chosen,
            # The forward pass reads pred; the backward pass does so again, and writes as much.
            bytes=sets[0][0].nbytes * (1 if direction == "forward" else 3),
            inputs_in_l2=fit_l2(sets, device),
        )  # fmt: skip
        record(row)
    benchmark(synchronized(functools.partial(steps[chosen], *sets[0])))


def _check_parity(losses: dict[str, Function], inputs: list[Tensor]) -> None:
    """No speed is printed for a wrong result."""
    eager = losses["eager"]
    exact = [inputs[0].detach().double().requires_grad_(), *(t.double() for t in inputs[1:])]
    for what, of in (("forward", lambda loss: loss), ("backward", _with_gradient)):
        expected, ideal = of(eager)(*inputs), of(eager)(*exact)
        for name, loss in losses.items():
            assert_parity(of(loss)(*inputs), expected, ideal, f"{name} {what}")
