"""cascaded_attention: every backend against the reference, the reference against its meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import kernelpose
from kernelpose.backend import OPS, choose
from kernelpose.ops import cascaded_attention
from tests.ops import checks
from tests.parity import assert_parity

KERNELS = [name for name in OPS["cascaded_attention"].dtypes if name != "eager"]
NAMES = (
    "x",
    "reduce_weight",
    "reduce_bias",
    "q_weight",
    "q_bias",
    "kv_weight",
    "kv_bias",
    "out_weight",
    "out_bias",
    "norm_weight",
    "norm_bias",
)


@dataclass(frozen=True)
class Case:
    size: tuple[int, int]
    groups: int
    width: int
    heads: int
    ratio: int
    batch: int = 2
    op: str = "cascaded_attention"

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """As NAMES has them; norms that stretch and move, products of about one."""
        g, d, r = self.groups, self.width, self.ratio
        shapes = [(self.batch, *self.size, g * d), (g * d, 1, r, r), (g * d,)]
        shapes += [(g, d, d), (g, d), (g, 2 * d, d), (g, 2 * d), (g, d, d), *3 * [(g, d)]]
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        for name, tensor in zip(NAMES, tensors, strict=True):
            if name == "reduce_weight":
                tensor /= r
            elif name.endswith("_weight") and tensor.ndim == 3:
                tensor /= d**0.5
        return [t.to(device=device, dtype=dtype) for t in tensors]

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(inputs), {"num_heads": self.heads}

    def run(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        args, options = self.arguments(inputs)
        return cascaded_attention(*args, **options, backend=backend)


CASES = {
    "small": Case((4, 6), 3, 16, 2, 2),
    # The stages of HEViTPose: 48 keys for 256 x 192 pixels, 64 for 256 x 256.
    "t-stage1": Case((64, 48), 4, 16, 2, 8, batch=1),
    "s-stage1": Case((64, 64), 4, 32, 2, 8, batch=1),
    "b-stage1": Case((64, 48), 4, 40, 2, 8, batch=1),
    "s-stage2": Case((32, 32), 4, 48, 2, 4, batch=1),
    "b-stage2": Case((32, 24), 4, 64, 2, 4, batch=1),
    "b-stage3": Case((16, 12), 4, 96, 2, 2),
    "b-stage3-square": Case((16, 16), 4, 96, 2, 2, batch=1),
    "odd": Case((9, 15), 2, 24, 3, 3, batch=3),
    "odd-width": Case((9, 15), 2, 21, 3, 3, batch=3),
    "one-group": Case((6, 5), 1, 8, 1, 1),
    "one-key": Case((5, 5), 2, 24, 1, 5),
    "narrow-heads": Case((4, 4), 2, 8, 8, 2),
    "widest": Case((4, 6), 2, 128, 1, 2, batch=1),
    "many-keys": Case((24, 25), 2, 32, 2, 1, batch=1),
    "batch-0": Case((4, 6), 3, 16, 2, 2, batch=0),
}


@pytest.mark.parametrize(("case", "backend", "dtype"), checks.parity_matrix(CASES))
def test_parity(case: Case, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    checks.check_forward_parity(case, backend, dtype)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
@pytest.mark.parametrize("name", ["small", "odd", "one-key"])
def test_each_place_by_the_equations(name: str, backend: str) -> None:
    """Written out: head by head and place by place."""
    case, device = CASES[name], checks.device_for(backend)
    inputs = case.inputs(torch.float32, device)
    t = dict(zip(NAMES, (x.double() for x in inputs), strict=True))
    d, r, e = case.width, case.ratio, case.width // case.heads
    found = torch.zeros(case.batch, *case.size, d, dtype=torch.float64, device=device)
    expected = []
    for i in range(case.groups):
        mine = slice(i * d, (i + 1) * d)
        u = t["x"][..., mine] + found
        kernel = t["reduce_weight"][mine, 0]
        blocks = u.unflatten(1, (-1, r)).unflatten(3, (-1, r))  # image, row, r, column, r, channel
        reduced = torch.einsum("nahbwc,chw->nabc", blocks, kernel) + t["reduce_bias"][mine]

        def norm(y: Tensor) -> Tensor:
            variance, mean = torch.var_mean(y, -1, correction=0, keepdim=True)
            return (y - mean) / (variance + 1e-5).sqrt()

        q = norm(u).flatten(1, 2) @ t["q_weight"][i].T + t["q_bias"][i]
        kv = norm(reduced).flatten(1, 2) @ t["kv_weight"][i].T + t["kv_bias"][i]
        heads = []
        for h in range(case.heads):
            k, v = (kv[..., first + h * e : first + (h + 1) * e] for first in (0, d))
            heads.append((q[..., h * e : (h + 1) * e] @ k.mT / e**0.5).softmax(-1) @ v)
        y = torch.cat(heads, -1) @ t["out_weight"][i].T + t["out_bias"][i]
        found = (norm(y) * t["norm_weight"][i] + t["norm_bias"][i]).unflatten(1, case.size)
        expected.append(found)
    torch.testing.assert_close(
        case.run(inputs, backend).double(), torch.cat(expected, -1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_eps(backend: str) -> None:
    case = CASES["small"]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    got = cascaded_attention(*inputs, num_heads=2, eps=0.5, backend=backend)
    exact = cascaded_attention(*(x.double() for x in inputs), num_heads=2, eps=0.5, backend="eager")
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)
    assert (got - case.run(inputs, backend)).abs().max() > 0.01


@pytest.mark.parametrize("backend", KERNELS)
def test_norms_of_channels_far_from_zero(backend: str) -> None:
    """A variance is no difference of large numbers."""
    case = CASES["odd"]
    x, *rest = case.inputs(torch.float32, checks.device_for(backend))
    inputs = [x + 1000, *rest]
    exact = case.run([t.double() for t in inputs], "eager")
    assert_parity(case.run(inputs, backend), case.run(inputs, "eager"), exact)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "odd", "many-keys"])
def test_large_scores_and_nan(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    inputs[3] *= 1e4
    inputs[5] *= 1e4
    assert all(case.run(inputs, b).isfinite().all() for b in (backend, "eager"))
    inputs[0][0, 0, 0, case.width] = torch.nan  # in the second group: the first does not see it
    got, expected = (case.run(inputs, b).isnan() for b in (backend, "eager"))
    assert torch.equal(got, expected) and got.any() and not got[0, ..., : case.width].any()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "odd"])
def test_non_contiguous_inputs(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    strided = [torch.stack((t, t), -1)[..., 0] for t in inputs]
    maps = inputs[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    expected = case.run(inputs, backend)
    for others in (strided, [maps, *inputs[1:]]):
        assert not others[0].is_contiguous()
        got = case.run(others, backend)
        assert torch.equal(got, expected) and got.is_contiguous()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "odd"])
def test_inputs_are_never_written_wherever_they_start(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    moved = [torch.cat((t.flatten()[:1], t.flatten()))[1:].view_as(t) for t in inputs]
    copies = [t.clone() for t in moved]
    assert torch.equal(case.run(moved, backend), case.run(inputs, backend))
    assert all(torch.equal(*pair) for pair in zip(moved, copies, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["b-stage2", "odd", "t-stage1"])
def test_deterministic_whatever_the_threads(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    expected, before = case.run(inputs, backend), torch.get_num_threads()
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(case.run(inputs, backend), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["small", "batch-0"])
def test_opcheck(name: str, backend: str) -> None:
    inputs = CASES[name].inputs(torch.float32, checks.device_for(backend))
    args = (*inputs, CASES[name].heads, 1e-5, backend)
    torch.library.opcheck(torch.ops.kernelpose.cascaded_attention.default, args)


class _Attend(torch.nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return cascaded_attention(*inputs, num_heads=2)  # type: ignore[misc, arg-type]


@pytest.mark.parametrize("backend", KERNELS)
def test_export(backend: str) -> None:
    """The program holds the op, and takes any batch and any map."""
    inputs = CASES["small"].inputs(torch.float32, checks.device_for(backend))
    batch, rows, columns = (torch.export.Dim(name) for name in ("batch", "rows", "columns"))
    shapes = ({0: batch, 1: 2 * rows, 2: 2 * columns}, *10 * [None])
    larger = torch.randn(3, 8, 10, 48, device=inputs[0].device)
    with kernelpose.backend(backend):
        program = torch.export.export(_Attend(), tuple(inputs), dynamic_shapes={"inputs": shapes})
        expected = _Attend()(larger, *inputs[1:])
    assert "kernelpose.cascaded_attention" in program.graph_module.code
    assert torch.equal(program.module()(larger, *inputs[1:]), expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_autocast_of_the_registered_op(backend: str) -> None:
    case, device = CASES["small"], checks.device_for(backend)
    inputs = case.inputs(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        got = torch.ops.kernelpose.cascaded_attention(*inputs, case.heads, 1e-5, backend)
    assert torch.equal(got, case.run([t.bfloat16() for t in inputs], backend))


@pytest.mark.parametrize("backend", KERNELS)
def test_inference_mode_and_the_way_around_the_dispatcher(backend: str) -> None:
    case = CASES["odd"]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    registered = torch.ops.kernelpose.cascaded_attention(*inputs, case.heads, 1e-5, backend)
    with torch.inference_mode():
        direct = case.run(inputs, backend)
    assert torch.equal(direct, registered) and direct.stride() == registered.stride()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", ["b-stage3", "b-stage1"])
def test_side_stream_and_graph_capture(name: str, backend: str) -> None:
    checks.check_side_stream(CASES[name], backend)
    checks.check_graph_capture(CASES[name], backend)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_compiles_to_one_graph(backend: str) -> None:
    case = CASES["small"]
    inputs = case.inputs(torch.float32, checks.device_for(backend))
    checks.check_compile(lambda *x: case.run(x, backend), *inputs)


def test_gradient_comes_from_eager() -> None:
    """Also where torch.compile traces the choice; of any of the tensors."""
    case = Case((2, 2), 2, 4, 2, 1, batch=1)
    inputs = [x.requires_grad_() for x in case.inputs(torch.float64)]
    args, options = case.arguments(inputs)
    assert choose(case.op, None, *args, **options) == "eager"
    torch.autograd.gradcheck(lambda *x: case.run(x), inputs)
    checks.check_compile(lambda *x: case.run(x), *inputs)
    for name in KERNELS:
        reason = OPS[case.op].objection(name, *(x.detach() for x in args[:-1]), args[-1], **options)
        assert reason == "it has no gradient, and an input requires one"
    with torch.no_grad():
        assert choose(case.op, None, *args, **options) == "cpu"


def objection(backend: str, case: Case) -> str | None:
    """Of tensors that take no memory."""
    x = torch.empty(1, device="meta").expand(case.batch, *case.size, case.groups * case.width)
    reduce = x.new_empty(1).expand(1, 1, case.ratio, case.ratio)
    weight = x.new_empty(1).expand(case.groups, case.width, case.width)
    inputs = [x, reduce, reduce[0, 0, 0], weight]
    return OPS[case.op].objection(backend, *inputs, num_heads=case.heads)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("within", "beyond", "text"),
    [
        (Case((4, 4), 2, 128, 2, 2), Case((4, 4), 2, 129, 3, 2), "at most 128 channels, and these"),
        (Case((1, 4), 2**16, 128, 2, 1), Case((1, 4), 2**17, 128, 2, 1), f"{2**24} channels, and"),
        (Case((1, 2**30 - 1), 2, 8, 1, 1), Case((2**15, 2**15), 2, 8, 1, 1), "places of a map"),
    ],
)
def test_no_room_is_an_objection(backend: str, within: Case, beyond: Case, text: str) -> None:
    assert objection(backend, within) is None
    assert text in (objection(backend, beyond) or "")


@pytest.mark.parametrize(
    ("backend", "case", "text"),
    [
        ("cuda", Case((4, 4), 2, 12, 2, 2), "a multiple of 8 channels, and these 12"),
        ("triton", Case((4, 4), 2, 72, 1, 2), "at most 64 channels in float32, and these 72"),
        ("cuda", Case((256, 256), 2, 16, 2, 256), "fewer than 65536 places that become one"),
        ("triton", Case((256, 256), 2, 12, 2, 256), "fewer than 65536 places that become one"),
        ("triton", Case((2**15, 2**14), 2, 12, 2, 1, batch=4), "fewer than 2147483648 places of"),
    ],
)
def test_no_room_on_a_gpu_is_an_objection(backend: str, case: Case, text: str) -> None:
    assert text in (objection(backend, case) or "")


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_autocast(backend: str) -> None:
    """All tensors are cast, whatever each was; float64 is left alone."""
    case, device = CASES["small"], checks.device_for(backend)
    inputs = case.inputs(torch.float32, device)
    expected = case.run([x.bfloat16() for x in inputs], backend)
    mixed = [x.bfloat16() if i % 2 else x for i, x in enumerate(inputs)]
    with torch.autocast(device, torch.bfloat16):
        outputs = [case.run(x, backend) for x in (inputs, mixed)]
        wide = case.run([x.double() for x in inputs], "eager")
    assert all(x.dtype == torch.bfloat16 and torch.equal(x, expected) for x in outputs)
    assert wide.dtype == torch.float64


X = torch.zeros(2, 4, 6, 16)
GOOD = Case((4, 6), 2, 8, 2, 2).inputs(torch.float32)


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("x", [1.0], TypeError, "x is list; expected a tensor"),
        ("out_bias", None, TypeError, "out_bias is NoneType; expected a tensor"),
        ("x", X.long(), TypeError, r"x is torch\.int64; expected a floating-point"),
        ("x", X[0], ValueError, r"x has shape \(4, 6, 16\); expected \(B, H, W, C\), H, W and C"),
        ("x", X[:, :0], ValueError, r"x has shape \(2, 0, 6, 16\); expected \(B, H, W, C\), H, W"),
        ("x", X[:, :3], ValueError, r"x has shape \(2, 3, 6, 16\); .* H and W multiples of 2"),
        ("x", X[..., :8], ValueError, r"reduce_weight has shape \(16, 1, 2, 2\); expected \(8, 1"),
        ("reduce_weight", X[0], ValueError, r"reduce_weight has .*; expected \(16, 1, R, R\)"),
        ("q_weight", X[0], ValueError, r"q_weight has .*; expected \(G, d, d\), G d = 16, as x"),
        ("kv_weight", GOOD[3], ValueError, r"kv_weight has .*; expected \(2, 16, 8\), as x has"),
        ("norm_bias", GOOD[2], ValueError, r"norm_bias has shape \(16,\); expected \(2, 8\), as x"),
        ("q_bias", GOOD[4].half(), TypeError, r"q_bias is torch\.float16; expected torch\.float32"),
        ("q_bias", GOOD[4].to("meta"), ValueError, "q_bias is on meta; expected cpu, as x"),
        ("num_heads", 3, ValueError, "num_heads is 3; expected a divisor of d, which is 8"),
        ("num_heads", 0, ValueError, "num_heads is 0; expected a divisor of d"),
        ("eps", -1.0, ValueError, r"eps is -1\.0; expected a number of at least 0"),
        ("eps", "a", ValueError, "eps is 'a'; expected a number of at least 0"),
        ("backend", "metal", ValueError, "backend is 'metal'"),
    ],
)
def test_errors_name_the_argument(name: str, value: Any, error: type[Exception], text: str) -> None:
    arguments = {**dict(zip(NAMES, GOOD, strict=True)), "num_heads": 2, name: value}
    with pytest.raises(error, match=text) as caught:
        cascaded_attention(**arguments)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
