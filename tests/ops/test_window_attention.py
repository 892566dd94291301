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


CASES = {
    "full": Case((16, 12), 2, 64),
    "full-narrow": Case((5, 7), 3, 20),
    "full-bias": Case((6, 5), 2, 48, bias=True),
    "full-two-tiles": Case((20, 16), 1, 30, batch=1),
    "window": Case((16, 12), 2, 32, window=(8, 6)),
    "shifted": Case((16, 12), 2, 32, window=(8, 6), shift=(4, 3), bias=True),
    "shifted-pooled": Case((16, 16), 1, 80, window=(8, 8), shift=(4, 4), pooled=True),
    "odd": Case((9, 7), 2, 30, window=(4, 3), shift=(2, 1), bias=True, pooled=True),
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


@pytest.mark.parametrize("name", ["odd", "full", "batch-0"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(name: str, grad: bool) -> None:
    case = CASES[name]
    inputs = [x.detach().requires_grad_(grad) for x in case.inputs(torch.float32)]
    options = (
        case.heads, list(case.window or case.size), list(case.shift), case.partition,
        case.pooled, 0.5, "cpu",
    )  # fmt: skip
    args = (inputs[0], inputs[1] if case.bias else None, *options)
    torch.library.opcheck(torch.ops.kernelpose.window_attention.default, args)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("name", ["odd", "full", "grid"])
def test_compiles_to_one_graph(name: str, backend: str) -> None:
    case = CASES[name]
    checks.check_compile(lambda *x: case.run(x, backend), *case.inputs(torch.float32))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", ["odd", "shifted-pooled"])
def test_side_stream_and_graph_capture(name: str, backend: str) -> None:
    checks.check_side_stream(CASES[name], backend)
    checks.check_graph_capture(CASES[name], backend)


@pytest.mark.full
def test_compiles_with_inductor_and_dynamic_sizes() -> None:
    def run(qkv: Tensor) -> Tensor:
        return window_attention(qkv, num_heads=2, window=(4, 4), shift=(2, 2))

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for batch, height, width in ((1, 8, 8), (3, 9, 7), (2, 16, 12)):
        qkv = torch.randn(batch, height, width, 48)
        torch.testing.assert_close(compiled(qkv), run(qkv))


def test_compiled_code_follows_the_chosen_backend() -> None:
    torch._dynamo.reset()
    qkv = torch.randn(1, 8, 8, 48)
    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(
        lambda x: window_attention(x, num_heads=2, window=(4, 4)), fullgraph=True, backend=record
    )
    compiled(qkv)
    with kernelpose.backend("eager"):
        compiled(qkv)
    assert ["kernelpose.window_attention" in code for code in graphs] == [True, False]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = WindowAttention(
            32, 2, window=(4, 4), shift=(2, 2), relative_position=True, pooled=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


def test_export() -> None:
    block, x = _Block().eval(), torch.randn(2, 9, 7, 32)
    batch = torch.export.Dim("batch")
    program = torch.export.export(block, (x,), dynamic_shapes=({0: batch},))
    assert "kernelpose.window_attention" in program.graph_module.code
    other = torch.randn(5, 9, 7, 32)
    torch.testing.assert_close(program.module()(other), block(other))


def test_autocast() -> None:
    block, x = _Block(), torch.randn(2, 9, 7, 32)
    seen: list[torch.dtype] = []
    hook = block.attention.proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        block(x).sum().backward()
    hook.remove()
    assert seen == [torch.bfloat16]
    table = block.attention.relative_position_bias_table
    assert table is not None and table.grad is not None and table.grad.dtype == torch.float32
    qkv = torch.randn(1, 4, 4, 24)
    options = (2, [4, 4], [0, 0], "window", False, 0.5, "cpu")
    with torch.autocast("cpu", torch.bfloat16):  # the registered op by itself, too
        assert torch.ops.kernelpose.window_attention(qkv, None, *options)[0].dtype == torch.bfloat16


def test_inference_mode_and_the_way_around_the_dispatcher() -> None:
    case = CASES["odd"]
    inputs = case.inputs(torch.float32)
    registered = case.run(inputs, "cpu")
    assert registered.grad_fn is not None
    with torch.inference_mode():
        direct = case.run([x.detach() for x in inputs], "cpu")
    assert torch.equal(direct, registered)


def test_function_transforms() -> None:
    """torch.func sees plain PyTorch, which agrees with the kernel's own backward."""
    qkv = torch.randn(3, 1, 4, 4, 24)

    def total(x: Tensor) -> Tensor:
        return window_attention(x, num_heads=2, window=(2, 2)).square().sum()

    transformed = torch.func.vmap(torch.func.grad(total))(qkv)
    leaf = qkv.clone().requires_grad_()
    torch.stack([total(x) for x in leaf]).sum().backward()
    torch.testing.assert_close(transformed, leaf.grad)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_jit_trace_keeps_the_op() -> None:
    qkv = torch.randn(1, 4, 4, 24)

    def run(x: Tensor) -> Tensor:
        return window_attention(x, num_heads=2, window=(2, 2), backend="cpu")

    with torch.no_grad():
        traced = torch.jit.trace(run, (qkv,))
    other = torch.randn(1, 4, 4, 24)
    assert torch.equal(traced(other), run(other))


def test_second_derivative_is_refused_and_eager_has_it() -> None:
    qkv = torch.randn(1, 4, 4, 24, requires_grad=True)
    for backend in ("cpu", "eager"):
        out = window_attention(qkv, num_heads=2, window=(2, 2), backend=backend)
        (first,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
        if backend == "cpu":
            with pytest.raises(RuntimeError, match="no second derivative on this backend"):
                torch.autograd.grad(first.square().sum(), qkv)
        else:
            assert torch.autograd.grad(first.square().sum(), qkv)[0].abs().max() > 0


def test_forward_mode_derivative() -> None:
    qkv, direction = torch.randn(2, 1, 4, 4, 24, dtype=torch.float64).unbind()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(qkv, direction)
        out = window_attention(dual, num_heads=2, window=(2, 2))
        tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
    step = 1e-6 * direction
    ahead, behind = (window_attention(qkv + s, num_heads=2, window=(2, 2)) for s in (step, -step))
    torch.testing.assert_close(tangent, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["odd", "full"])
def test_non_contiguous_input_and_gradient(name: str) -> None:
    case = CASES[name]
    qkv, *rest = case.inputs(torch.float32)
    expected = case.run([qkv, *rest], "cpu")
    strided = qkv.detach().permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0).requires_grad_()
    assert not strided.is_contiguous()
    got = case.run([strided, *rest], "cpu")
    assert torch.equal(got, expected)
    grad = torch.ones(1).expand_as(got)
    assert torch.equal(
        torch.autograd.grad(got, strided, grad)[0], torch.autograd.grad(expected, qkv, grad)[0]
    )


def test_backward_is_deterministic_whatever_the_threads() -> None:
    case = CASES["odd"]
    inputs = case.inputs(torch.float32)
    before = torch.get_num_threads()
    results: list[tuple[Tensor, ...]] = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        output = case.run(inputs, "cpu")
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_inputs_are_never_written() -> None:
    case = CASES["odd"]
    inputs = case.inputs(torch.float32)
    copies = [x.detach().clone() for x in inputs]
    case.run(inputs, "cpu").sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


def test_large_scores_and_nan() -> None:
    qkv = torch.randn(1, 4, 4, 24) * 1e4
    for backend in ("cpu", "eager"):
        assert window_attention(qkv, num_heads=2, window=(2, 2), backend=backend).isfinite().all()
    qkv[0, 0, 0, 0] = torch.nan
    got, expected = (
        window_attention(qkv, num_heads=2, window=(2, 2), backend=b).isnan()
        for b in ("cpu", "eager")
    )
    assert torch.equal(got, expected) and got.any() and not got.all()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_heads": 5}, ValueError, "num_heads is 5; expected a divisor"),
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
        ({"bias_table": torch.zeros(4, 2)}, ValueError, r"bias_table has shape \(4, 2\)"),
        ({"backend": "metal"}, ValueError, "backend is 'metal'"),
        (
            {"backend": "cuda"},
            kernelpose.BackendError,
            "'cuda' cannot run window_attention: it runs",
        ),
        (
            {"backend": "torch", "window": (4, 4)},
            kernelpose.BackendError,
            "'torch' cannot run window_attention: scaled_dot_product_attention does full",
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


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str, run_python: Any) -> None:
    """The same parity in a process of its own for each build of the CPU kernels."""
    script = """
import torch
from kernelpose import _native
from tests.ops import checks
from tests.ops.test_window_attention import CASES
print(_native.core.cpu_isa())
for name in ("odd", "shifted", "shifted-pooled", "full-two-tiles", "grid-odd"):
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        checks.check_parity(CASES[name], "cpu", dtype)
print("done")
"""
    lines = run_python(script, KERNELPOSE_CPU_ISA=isa).split()
    if lines[0] != isa:
        pytest.skip(f"this machine runs {lines[0]} at best")
    assert lines[-1] == "done"


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
