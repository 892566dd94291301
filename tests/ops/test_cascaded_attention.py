"""cascaded_attention: every backend against the reference, and the reference against its meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kernelpose.backend import OPS, choose
from kernelpose.ops import cascaded_attention
from tests.ops import checks

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
    "odd": Case((9, 15), 2, 21, 3, 3, batch=3),
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
