"""window_attention: every backend against the reference, and the reference against the maths."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernelpose
from kernelpose.nn import WindowAttention
from kernelpose.ops import window_attention
from tests.ops import checks

Pair = tuple[int, int]


@dataclass(frozen=True)
class Case:
    size: Pair
    heads: int
    head_dim: int
    window: Pair | None = None
    shift: Pair = (0, 0)
    partition: str = "window"
    bias: bool = False
    pooled: bool = False
    batch: int = 2
    op: str = "window_attention"

    @property
    def extent(self) -> Pair:
        window = self.window or self.size
        if self.partition == "window":
            return window
        return -(-self.size[0] // window[0]), -(-self.size[1] // window[1])

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        qkv = draw(self.batch, *self.size, 3 * self.heads * self.head_dim)
        inputs = [qkv.to(device=device, dtype=dtype)]
        if self.bias:
            h, w = self.extent
            wide = dtype if dtype == torch.float64 else torch.float32
            inputs.append(draw((2 * h - 1) * (2 * w - 1), self.heads).to(device=device, dtype=wide))
        return [x.requires_grad_() for x in inputs]

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor], dict[str, Any]]:
        options = {
            "num_heads": self.heads,
            "window": self.window,
            "shift": self.shift,
            "partition": self.partition,
            "bias_table": inputs[1] if self.bias else None,
            "pooled": self.pooled,
        }
        return (inputs[0],), options

    def run(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        args, options = self.arguments(inputs)
        return window_attention(*args, **options, backend=backend)


KERNELS = ("cpu", "cuda", "triton")

CASES = {
    "full": Case((16, 12), 2, 64),
    "full-narrow": Case((5, 7), 3, 20),
    "full-bias": Case((6, 5), 2, 48, bias=True),
    "full-two-tiles": Case((20, 16), 1, 30, batch=1),
    "window": Case((16, 12), 2, 32, window=(8, 6)),
    "shifted": Case((16, 12), 2, 32, window=(8, 6), shift=(4, 3), bias=True),
    "shifted-pooled": Case((16, 16), 1, 80, window=(8, 8), shift=(4, 4), pooled=True),
    "odd": Case((9, 7), 2, 30, window=(4, 3), shift=(2, 1), bias=True, pooled=True),
    "small": Case((5, 4), 2, 8, window=(3, 2), shift=(1, 1), bias=True, pooled=True, batch=1),
    "odd-one-axis": Case((9, 7), 2, 16, window=(4, 3), shift=(0, 2), pooled=True),
    "window-above-map": Case((3, 2), 2, 48, window=(8, 8), shift=(4, 4), bias=True),
    "grid": Case((8, 6), 1, 32, window=(2, 2), partition="grid"),
    "grid-odd": Case((9, 7), 2, 20, window=(2, 3), partition="grid", bias=True, pooled=True),
    "one-token": Case((1, 1), 2, 8, window=(2, 2)),
    "widest-head": Case((4, 4), 1, 128, window=(4, 4)),
    "full-batch-0": Case((4, 4), 2, 8, batch=0),
    "batch-0": Case((8, 8), 2, 16, window=(4, 4), shift=(2, 2), bias=True, batch=0),
}


@pytest.mark.parametrize(("case", "backend", "dtype"), checks.parity_matrix(CASES))
def test_parity(case: Case, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    checks.check_parity(case, backend, dtype)


def _axis_cells(size: int, window: int, shift: int, grid: bool) -> list[list[int]]:
    if grid:
        return [list(range(i, size, window)) for i in range(min(window, size))]
    starts = [0, *range(shift, size, window)] if shift else range(0, size, window)
    ends = [shift if shift and start == 0 else start + window for start in starts]
    return [list(range(a, min(b, size))) for a, b in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.batch and not c.pooled])
def test_reference_is_attention_within_cells(name: str) -> None:
    """The definition written from the other side: no roll and no mask, a shifted ruler instead."""
    case = CASES[name]
    inputs = case.inputs(torch.float64)
    qkv, window = inputs[0].detach(), case.window or case.size
    grid = case.partition == "grid"
    q, k, v = qkv.unflatten(-1, (3, case.heads, case.head_dim)).unbind(3)
    expected = torch.full((*qkv.shape[:3], case.heads, case.head_dim), torch.nan).double()
    axes = (_axis_cells(*sizes, grid) for sizes in zip(case.size, window, case.shift, strict=True))
    h, w = case.extent
    for rows, columns in itertools.product(*axes):
        tokens = list(itertools.product(rows, columns))
        places = list(itertools.product(range(len(rows)), range(len(columns))))
        for head, (i, (y, x)) in itertools.product(range(case.heads), enumerate(tokens)):
            scores = []
            for j, (ky, kx) in enumerate(tokens):
                score = (q[:, y, x, head] * k[:, ky, kx, head]).sum(-1) / case.head_dim**0.5
                if case.bias:
                    dy, dx = places[i][0] - places[j][0], places[i][1] - places[j][1]
                    score = score + inputs[1][(dy + h - 1) * (2 * w - 1) + dx + w - 1, head]
                scores.append(score)
            weights = torch.stack(scores, -1).softmax(-1)
            values = torch.stack([v[:, ky, kx, head] for ky, kx in tokens], 1)
            expected[:, y, x, head] = (weights[:, :, None] * values).sum(1).detach()
    torch.testing.assert_close(case.run(inputs, "eager").detach(), expected.flatten(3))


def test_reference_pools_the_rolled_windows() -> None:
    """Every window's own keys, and the mean key and value of each window of the rolled map."""
    torch.manual_seed(0)
    qkv = torch.randn(1, 8, 8, 3 * 4, dtype=torch.float64)
    got = window_attention(
        qkv, num_heads=1, window=(4, 4), shift=(2, 2), pooled=True, backend="eager"
    )
    rolled = qkv.roll((-2, -2), (1, 2))
    means = [rolled[0, y : y + 4, x : x + 4].mean((0, 1)) for y in (0, 4) for x in (0, 4)]
    for y, x in ((0, 0), (3, 3), (7, 1)):
        cell = [
            qkv[0, i, j]
            for i in range(8)
            for j in range(8)
            if (i + 2) // 4 == (y + 2) // 4 and (j + 2) // 4 == (x + 2) // 4
        ]
        keys = torch.stack([t[4:8] for t in (*cell, *means)])
        values = torch.stack([t[8:] for t in (*cell, *means)])
        weights = (keys @ qkv[0, y, x, :4] / 2).softmax(0)
        torch.testing.assert_close(got[0, y, x], weights @ values)


@pytest.mark.parametrize("name", ["odd", "grid-odd", "shifted", "full-two-tiles"])
def test_gradcheck(name: str) -> None:
    """The C++ backward in float64 against finite differences."""
    case = CASES[name]
    small = Case(
        (min(case.size[0], 6), min(case.size[1], 5)), 1, 3, case.window, case.shift,
        case.partition, case.bias, case.pooled, batch=1,
    )  # fmt: skip
    torch.autograd.gradcheck(lambda *x: small.run(x, "cpu"), small.inputs(torch.float64))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "full"])
def test_non_contiguous_input_and_gradient(name: str, backend: str) -> None:
    case = CASES[name]
    qkv, *rest = case.inputs(torch.float32, checks.device_for(backend))
    expected = case.run([qkv, *rest], backend)
    strided = qkv.detach().permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0).requires_grad_()
    assert not strided.is_contiguous()
    got = case.run([strided, *rest], backend)
    assert torch.equal(got, expected)
    grad = torch.ones(1, device=got.device).expand_as(got)
    assert torch.equal(
        torch.autograd.grad(got, strided, grad)[0], torch.autograd.grad(expected, qkv, grad)[0]
    )


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "odd", "shifted"])
def test_deterministic_whatever_the_threads(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    before = torch.get_num_threads()
    results: list[tuple[Tensor, ...]] = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            output = case.run(inputs, backend)
            results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_inputs_are_never_written(backend: str) -> None:
    case = CASES["small"]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    copies = [x.detach().clone() for x in inputs]
    case.run(inputs, backend).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_large_scores_and_nan(backend: str) -> None:
    qkv = torch.randn(1, 4, 4, 24, device=checks.device_for(backend)) * 1e4
    both = (backend, "eager")
    for name in both:
        assert window_attention(qkv, num_heads=2, window=(2, 2), backend=name).isfinite().all()
    qkv[0, 0, 0, 0] = torch.nan
    got, expected = (
        window_attention(qkv, num_heads=2, window=(2, 2), backend=name).isnan() for name in both
    )
    assert torch.equal(got, expected) and got.any() and not got.all()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_heads": 5}, ValueError, "num_heads is 5; expected a divisor of C"),
        ({"window": (0, 4)}, ValueError, r"window is \(0, 4\)"),
        ({"window": 4}, ValueError, "window is 4; expected"),
        ({"window": (4.0, 4.0)}, ValueError, r"window is \(4\.0, 4\.0\)"),
        ({"window": (4, 4), "shift": 2}, ValueError, "shift is 2; expected"),
        ({"scale": "a"}, TypeError, "scale is 'a'; expected a number"),
        ({"window": (4, 4), "shift": (4, 0)}, ValueError, r"shift is \(4, 0\)"),
        ({"shift": (1, 8)}, ValueError, "window is"),
        ({"partition": "strips"}, ValueError, "partition is 'strips'"),
        ({"partition": "grid"}, ValueError, "window is None"),
        ({"window": (2, 2), "shift": (1, 1), "partition": "grid"}, ValueError, "shift is"),
        ({"window": (2**31, 1)}, ValueError, r"window is \(2147483648, 1\); expected"),
        ({"bias_table": torch.zeros(4, 2)}, ValueError, r"bias_table has shape \(4, 2\)"),
        (
            {"window": (4, 4), "bias_table": torch.zeros(49, 2, device="meta")},
            ValueError,
            "bias_table is on meta; expected cpu",
        ),
        ({"backend": "metal"}, ValueError, "backend is 'metal'"),
        (
            {"backend": "cuda"},
            kernelpose.BackendError,
            "backend is 'cuda'; expected one that can run window_attention, .* cannot: it runs",
        ),
        (
            {"backend": "torch", "window": (4, 4)},
            kernelpose.BackendError,
            "backend is 'torch'; expected one .* cannot: scaled_dot_product_attention does full",
        ),
    ],
)
def test_errors_name_the_argument(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        window_attention(torch.zeros(1, 8, 8, 24), **{"num_heads": 2, **options})
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("shape", [(8, 8, 24), (1, 0, 8, 24), (1, 8, 8, 0)])
def test_wrong_map_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="qkv has shape"):
        window_attention(torch.zeros(shape), num_heads=2)


def test_integer_map() -> None:
    with pytest.raises(TypeError, match=r"qkv is torch\.int64; expected a floating-point"):
        window_attention(torch.zeros(1, 8, 8, 24, dtype=torch.int64), num_heads=2)


class _SwinBlock(nn.Module):
    """What golden/swin_block_timm.pt was recorded from: 48 wide, 3 heads, windows of 4 x 4."""

    def __init__(self, shift: Pair) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(48), nn.LayerNorm(48)
        self.attn = WindowAttention(48, 3, window=(4, 4), shift=shift, relative_position=True)
        layers = {"fc1": nn.Linear(48, 192), "gelu": nn.GELU(), "fc2": nn.Linear(192, 48)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TestModule:
    def test_state_dict_is_that_of_swin(self) -> None:
        module = WindowAttention(32, 2, window=(4, 4), relative_position=True)
        state = module.state_dict()
        assert {k: tuple(v.shape) for k, v in state.items()} == {
            "qkv.weight": (96, 32),
            "qkv.bias": (96,),
            "proj.weight": (32, 32),
            "proj.bias": (32,),
            "relative_position_bias_table": (49, 2),
        }
        state["relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
        module.load_state_dict(state)

    def test_golden_swin_blocks(self, shared: Path) -> None:
        """A whole Swin block of timm around our attention, without and with shift."""
        golden = torch.load(shared / "golden" / "swin_block_timm.pt", weights_only=True)
        for shift in (0, 2):
            record = golden[f"shift{shift}"]
            block = _SwinBlock((shift, shift)).eval()
            block.load_state_dict(record["state_dict"])
            with torch.no_grad():
                got = block(record["input"])
            torch.testing.assert_close(got, record["output"], atol=2e-6, rtol=2e-6)

    @pytest.mark.parametrize("partition", ["window", "grid"])
    def test_bias_table_size(self, partition: str) -> None:
        module = WindowAttention(
            32, 2, window=(2, 4), partition=partition, relative_position=True, map_size=(8, 8)
        )
        out = module(torch.randn(1, 8, 8, 32))
        assert out.shape == (1, 8, 8, 32) and out.isfinite().all()

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="num_heads is 5"):
            WindowAttention(32, 5)
        with pytest.raises(ValueError, match="map_size is None"):
            WindowAttention(32, 2, window=(2, 2), partition="grid", relative_position=True)
