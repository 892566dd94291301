"""The rule of parity: how far from the exact result a kernel may be."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR_ULP = 8


def assert_parity(
    got: Tensor,
    eager: Tensor,
    exact: Tensor,
    name: str = "result",
    dtype: torch.dtype | None = None,
) -> None:
    """The largest error of `got` is at most twice that of `eager`, plus a floor of FLOOR_ULP.

    got: what the kernel computed. eager: the reference in the same dtype. exact: the reference in
    float64. One ULP is eps of `dtype` (that of `got` if None) at the largest value of `exact`;
    give the dtype of the inputs where the result is kept in a wider one.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    exact = exact.double()
    error = (got.double() - exact).abs().max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item()
    dtype = dtype or got.dtype
    ulp = torch.finfo(dtype).eps * exact.abs().max().item()
    # In float64 eager and exact are one computation, whose own error nothing here measures.
    allowed += (4 if dtype == torch.float64 else 1) * FLOOR_ULP * ulp
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
