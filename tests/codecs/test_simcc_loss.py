"""The SimCC loss beside its definition, and as something to learn from."""

from __future__ import annotations

import math

import pytest
import torch

from kernelpose.codecs import decode_simcc, encode_simcc, simcc_loss


def logits(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, bins, generator=generator).to(dtype) for bins in (24, 32)]


def targets() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keypoints = torch.tensor([[[3.0, 4.0], [9.0, 12.0], [5.0, 5.0]]]).repeat(2, 1, 1)
    visible = torch.tensor([[1.0, 0.0, 0.5], [1.0, 1.0, 1.0]])
    return encode_simcc(keypoints, visible, input_size=(16, 12), sigma=2.0)


def test_definition() -> None:
    (x, y), (target_x, target_y, weights) = logits(), targets()
    expected = 0.0
    for scores, target in ((x, target_x), (y, target_y)):
        for person in range(2):
            for joint in range(3):
                row, aim = scores[person, joint].double(), target[person, joint].double()
                normaliser = math.log(sum(math.exp(v) for v in row.tolist()))
                divergence = sum(
                    t * (math.log(t) - (v - normaliser))
                    for v, t in zip(row.tolist(), aim.tolist(), strict=True)
                    if t > 0
                )
                expected += float(weights[person, joint]) * divergence / len(row)
    found = simcc_loss(x, y, target_x, target_y, weights)
    assert float(found) == pytest.approx(expected / 3, rel=1e-5)


def test_the_gradient_is_that_of_softmax() -> None:
    (x, y), (target_x, target_y, weights) = logits(), targets()
    x.requires_grad_()
    simcc_loss(x, y, target_x, target_y, weights).backward()
    mass = target_x.sum(-1, keepdim=True)
    expected = (mass * x.softmax(-1) - target_x) * weights[..., None] / (24 * 3)
    torch.testing.assert_close(x.grad, expected)
    assert torch.equal(x.grad[0, 1], torch.zeros(24))  # a joint of weight 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    x, y = logits(dtype)
    found = simcc_loss(x, y, *targets())
    assert found.dtype == torch.float32
    assert torch.equal(found, simcc_loss(x.float(), y.float(), *targets()))


def test_nobody() -> None:
    empty = [tensor[:0] for tensor in (*logits(), *targets())]
    assert float(simcc_loss(*empty)) == 0


def test_logits_learn_the_keypoints() -> None:
    keypoints = torch.tensor([[[3.0, 4.0], [9.0, 12.5]]])
    wanted = encode_simcc(keypoints, torch.ones(1, 2), input_size=(16, 12))
    parameters = [torch.zeros(1, 2, bins, requires_grad=True) for bins in (24, 32)]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        simcc_loss(*parameters, *wanted).backward()
        optimizer.step()
    points, _ = decode_simcc(*(p.detach() for p in parameters))
    assert torch.equal(points, keypoints)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (0, r"x has shape \(2, 2, 24\); expected \(2, 3, 'bins'\), \(B, K\) of weights"),
        (3, r"target_y has shape \(2, 2, 32\); expected \(2, 3, 32\), as y"),
    ],
)
def test_shapes_that_do_not_fit(argument: int, message: str) -> None:
    arguments = [*logits(), *targets()]
    arguments[argument] = arguments[argument][:, :2]
    with pytest.raises(ValueError, match=message):
        simcc_loss(*arguments)
